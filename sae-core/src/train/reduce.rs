//! Workers that step together, each on its part of a batch.
//!
//! All hold the same [`TrainState`](super::TrainState). What a step needs to know of the whole batch
//! is a sum over the workers, and all of them get the same bits of it, so that they stay the same.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use burn::tensor::distributed::{ReduceOperation, all_reduce};
use burn::tensor::{Device, Tensor};

/// One of several workers.
///
/// The only thing that passes between them is [`sum`](Self::sum).
pub trait Reduce {
    /// Which one of them this is, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn n_workers(&self) -> usize;

    /// The sum of what all of them bring: the first call of each makes one sum, the second another.
    /// Waits for the others.
    ///
    /// # Errors
    /// If one is gone, or brought something of another length.
    fn sum(&mut self, own: Tensor<1>) -> Result<Tensor<1>, ReduceError>;
}

/// Why workers cannot go on together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReduceError {
    /// Another worker stopped; it says why itself.
    #[error("another of the {n_workers} workers is gone: see what it said")]
    Gone {
        /// How many there were.
        n_workers: usize,
    },
    /// They are not at the same place of the same run.
    #[error("worker {rank} brings {actual} numbers where worker 0 brings {expected}")]
    Length {
        /// The one that is not with the others.
        rank: usize,
        /// Numbers that the first one brings.
        expected: usize,
        /// Numbers that it brings.
        actual: usize,
    },
}

/// Whole matrices, from what each worker has of them.
pub(super) trait Gather: Reduce {
    /// The mean over the workers.
    fn mean(&mut self, own: Tensor<2>) -> Result<Tensor<2>, ReduceError> {
        let shape = own.dims();
        let sum = self.sum(own.reshape([shape[0] * shape[1]]))?;
        Ok(sum.div_scalar(self.n_workers() as f64).reshape(shape))
    }

    /// The rows of all workers one below the other, of which each has as many: a sum of matrices
    /// that are zero elsewhere.
    fn rows(&mut self, own: Tensor<2>) -> Result<Tensor<2>, ReduceError> {
        let ([n, d], rank, n_workers) = (own.dims(), self.rank(), self.n_workers());
        let whole = Tensor::zeros([n * n_workers, d], &own.device());
        let whole: Tensor<2> = whole.slice_assign([rank * n..(rank + 1) * n, 0..d], own);
        Ok(self.sum(whole.reshape([n * n_workers * d]))?.reshape([n * n_workers, d]))
    }
}

impl<R: Reduce + ?Sized> Gather for R {}

/// A worker in a thread of its own, beside others in this process.
///
/// Sums are taken in the order of ranks, so that the bits do not depend on who comes first.
#[derive(Debug)]
pub struct Thread {
    rank: usize,
    n_workers: usize,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    round: Mutex<Round>,
    changed: Condvar,
}

/// A sum in the making.
#[derive(Debug)]
struct Round {
    brought: Vec<Option<Tensor<1>>>,
    sum: Option<Result<Tensor<1>, ReduceError>>,
    /// How many have got the sum.
    n_done: usize,
    is_broken: bool,
}

impl Thread {
    /// So many workers, for as many threads.
    pub fn workers(n_workers: usize) -> Vec<Self> {
        let round =
            Round { brought: vec![None; n_workers], sum: None, n_done: 0, is_broken: false };
        let shared = Arc::new(Shared { round: Mutex::new(round), changed: Condvar::new() });
        let worker = |rank| Self { rank, n_workers, shared: shared.clone() };
        (0..n_workers).map(worker).collect()
    }

    fn gone(&self) -> ReduceError {
        ReduceError::Gone { n_workers: self.n_workers }
    }

    /// The round, once that holds.
    fn when(&self, holds: impl Fn(&Round) -> bool) -> Result<MutexGuard<'_, Round>, ReduceError> {
        let round = self.shared.round.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .shared
            .changed
            .wait_while(round, |round| !holds(round) && !round.is_broken)
            .unwrap_or_else(PoisonError::into_inner);
        match holds(&waited) {
            true => Ok(waited),
            false => Err(self.gone()),
        }
    }
}

impl Reduce for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_workers(&self) -> usize {
        self.n_workers
    }

    fn sum(&mut self, own: Tensor<1>) -> Result<Tensor<1>, ReduceError> {
        let device = own.device();
        // The last sum has to be with everybody before the next begins.
        let mut round = self.when(|round| round.sum.is_none())?;
        round.brought[self.rank] = Some(own);
        if round.brought.iter().all(Option::is_some) {
            let brought = round.brought.iter_mut().filter_map(Option::take);
            round.sum = Some(sum_of(brought.collect()));
            self.shared.changed.notify_all();
        }
        drop(round);
        let mut round = self.when(|round| round.sum.is_some())?;
        let sum = round.sum.clone().ok_or_else(|| self.gone())?;
        round.n_done += 1;
        if round.n_done == self.n_workers {
            round.n_done = 0;
            round.sum = None;
            self.shared.changed.notify_all();
        }
        sum.map(|sum| sum.to_device(&device))
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        let mut round = self.shared.round.lock().unwrap_or_else(PoisonError::into_inner);
        round.is_broken = true;
        self.shared.changed.notify_all();
    }
}

/// In the order in which they are given, on the device of the first.
fn sum_of(brought: Vec<Tensor<1>>) -> Result<Tensor<1>, ReduceError> {
    let (expected, device) = (brought[0].dims()[0], brought[0].device());
    let other = brought.iter().position(|own| own.dims() != [expected]);
    if let Some(rank) = other {
        return Err(ReduceError::Length { rank, expected, actual: brought[rank].dims()[0] });
    }
    let sum = brought.into_iter().reduce(|sum, own| sum + own.to_device(&device));
    Ok(sum.expect("there are workers"))
}

/// A worker on a device of its own, by the collective operations of Burn's CubeCL devices.
///
/// Others stand on the other devices, each in a thread. In which order sums are taken is up to the
/// devices; that all get the same bits is their promise. There are no collective operations on CPU,
/// which panics at the first sum.
#[derive(Debug, Clone)]
pub struct Collective {
    rank: usize,
    devices: Vec<Device>,
}

impl Collective {
    /// A worker for each device.
    pub fn workers(devices: &[Device]) -> Vec<Self> {
        let worker = |rank| Self { rank, devices: devices.to_vec() };
        (0..devices.len()).map(worker).collect()
    }
}

impl Reduce for Collective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_workers(&self) -> usize {
        self.devices.len()
    }

    fn sum(&mut self, own: Tensor<1>) -> Result<Tensor<1>, ReduceError> {
        Ok(all_reduce(own, ReduceOperation::Sum, self.devices.clone()).resolve())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn numbers(values: &[f32]) -> Tensor<1> {
        Tensor::from_data(values, &Device::flex())
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_to_vec().expect("f32")
    }

    #[test]
    fn everybody_gets_the_sum_in_the_order_of_ranks() {
        // In any other order the small one is lost twice or not at all.
        let own = [1e8, -1e8, 1.5];
        let sums = thread::scope(|scope| {
            let workers = Thread::workers(3).into_iter().map(|mut worker| {
                scope.spawn(move || {
                    let own = own[worker.rank()];
                    let rounds = (0..50).map(|round| {
                        let sum = worker.sum(numbers(&[own, round as f32])).expect("all there");
                        values(sum)
                    });
                    rounds.collect::<Vec<_>>()
                })
            });
            let workers: Vec<_> = workers.collect();
            workers.into_iter().map(|w| w.join().expect("no panic")).collect::<Vec<_>>()
        });
        for sums in sums {
            for (round, sum) in sums.into_iter().enumerate() {
                assert_eq!(sum, [1.5, 3.0 * round as f32]);
            }
        }
    }

    #[test]
    fn rows_are_gathered_by_rank() {
        let gathered = thread::scope(|scope| {
            let workers = Thread::workers(2).into_iter().map(|mut worker| {
                scope.spawn(move || {
                    let rank = worker.rank() as f32;
                    let own = Tensor::from_data([[rank, 1.0], [rank, 2.0]], &Device::flex());
                    (values(worker.rows(own.clone()).unwrap()), values(worker.mean(own).unwrap()))
                })
            });
            let workers: Vec<_> = workers.collect();
            workers.into_iter().map(|w| w.join().expect("no panic")).collect::<Vec<_>>()
        });
        for (rows, mean) in gathered {
            assert_eq!(rows, [0.0, 1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 2.0]);
            assert_eq!(mean, [0.5, 1.0, 0.5, 2.0]);
        }
    }

    #[test]
    fn who_is_gone_keeps_nobody_waiting() {
        let mut workers = Thread::workers(2);
        drop(workers.pop());
        let error = workers[0].sum(numbers(&[1.0])).expect_err("alone");
        assert_eq!(error, ReduceError::Gone { n_workers: 2 });
    }

    #[test]
    fn other_lengths_are_told_to_everybody() {
        let errors = thread::scope(|scope| {
            let workers = Thread::workers(2).into_iter().map(|mut worker| {
                scope.spawn(move || {
                    let own = vec![1.0; 2 + worker.rank()];
                    let error = worker.sum(numbers(&own)).expect_err("of two lengths");
                    // Gone only when both have heard.
                    (worker, error)
                })
            });
            let workers: Vec<_> = workers.collect();
            workers.into_iter().map(|w| w.join().expect("no panic").1).collect::<Vec<_>>()
        });
        assert_eq!(errors, [ReduceError::Length { rank: 1, expected: 2, actual: 3 }; 2]);
    }
}
