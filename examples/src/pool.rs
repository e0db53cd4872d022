//! Runs a program on the thread pool that its kernels share.
//!
//! A parallel loop that is entered from outside the pool puts its thread to sleep and wakes
//! another, twice; one that is entered on the pool begins at once. Decoding enters some hundred
//! loops a token: 35 tokens a second became 50. Programs do this; libraries do not know where they
//! are called from.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

/// Runs a whole program on a thread of the pool.
pub fn on_the_pool<R: Send>(program: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| program())
}

/// What `of` gives for each item, in order: as many at a time as the pool has threads, and no more,
/// so that memory is bounded.
///
/// Small tensors keep one core busy: two batches side by side take less time than one after another
/// on two cores.
///
/// # Errors
/// That of an item; what has not begun by then is not begun.
pub fn side_by_side<T: Sync, R: Send, E: Send>(
    items: &[T],
    of: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let next = AtomicUsize::new(0);
    let worker = |_| {
        let mut own = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { return Ok(own) };
            match of(item) {
                Ok(found) => own.push((at, found)),
                Err(error) => {
                    next.store(items.len(), Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    };
    let workers = (0..rayon::current_num_threads()).into_par_iter().with_max_len(1).map(worker);
    let mut all: Vec<_> = workers.collect::<Result<Vec<_>, E>>()?.into_iter().flatten().collect();
    all.sort_by_key(|&(at, _)| at);
    Ok(all.into_iter().map(|(_, found)| found).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_and_an_error_ends_it() {
        let items: Vec<usize> = (0..100).collect();
        let squares = side_by_side(&items, |&i| Ok::<_, ()>(i * i)).unwrap();
        assert_eq!(squares, items.iter().map(|i| i * i).collect::<Vec<_>>());
        assert_eq!(side_by_side(&[], |&i: &usize| Ok::<_, ()>(i)), Ok(Vec::new()));
        let begun = AtomicUsize::new(0);
        let failed = side_by_side(&items, |&i| {
            begun.fetch_add(1, Ordering::Relaxed);
            if i == 3 { Err(i) } else { Ok(i) }
        });
        assert_eq!(failed, Err(3));
        assert!(begun.into_inner() < 3 + 2 * rayon::current_num_threads());
    }

    #[test]
    fn no_more_than_the_pool_has_threads_are_at_work_though_each_enters_the_pool() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let (at_work, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        pool.install(|| {
            side_by_side(&[(); 60], |()| {
                most.fetch_max(at_work.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                (0..1000).into_par_iter().for_each(|_| std::thread::yield_now());
                at_work.fetch_sub(1, Ordering::SeqCst);
                Ok::<_, ()>(())
            })
        })
        .unwrap();
        assert!((1..=3).contains(&most.into_inner()));
    }
}
