//! Counts what the process has allocated.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicIsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Counting;

static CURRENT: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);
/// Held by the test that measures, or does what another should not measure.
static TURN: Mutex<()> = Mutex::new(());

/// Tests run side by side, and readers start threads, so that only the whole process can be
/// measured: one test at a time.
pub fn turn() -> MutexGuard<'static, ()> {
    // A panic in another test says nothing about this one.
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What `f` returns, and the most bytes that the process held meanwhile beyond those it held before.
pub fn peak_of<T>(_turn: &MutexGuard<'static, ()>, f: impl FnOnce() -> T) -> (T, usize) {
    let before = CURRENT.load(Relaxed);
    PEAK.store(before, Relaxed);
    let value = f();
    (value, (PEAK.load(Relaxed) - before).unsigned_abs())
}

fn count(n_bytes: isize) {
    let now = CURRENT.fetch_add(n_bytes, Relaxed) + n_bytes;
    PEAK.fetch_max(now, Relaxed);
}

// SAFETY: the system's allocator does all the work. Counting allocates nothing.
#[expect(unsafe_code, reason = "the trait of an allocator is unsafe")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller keeps the promises of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller keeps the promises of `dealloc`.
        unsafe { System.dealloc(block, layout) }
    }

    // The default `realloc` allocates, copies and deallocates: both blocks are counted while both
    // are there.
}
