//! A part of a set, of a fixed size, by a seed.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// What is chosen on and what is reported on: a set is cut in two by its seed, and a part of any size
/// is taken from one side of the cut, so that no item is ever on both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// To choose on: the first half.
    Selection,
    /// To report on: the second half.
    Test,
}

/// The indices of `n` items of `len`, or all there are of the split, in their order. A larger part
/// holds a smaller one.
pub fn of_split(len: usize, split: Split, n: usize, seed: u64) -> Vec<usize> {
    let order = order(len, seed);
    let (selection, test) = order.split_at(len / 2);
    first(
        match split {
            Split::Selection => selection,
            Split::Test => test,
        },
        n,
    )
}

/// The indices of `n` items of `len`, or all there are, in their order, of a set that is used on one
/// side alone. A larger part holds a smaller one.
pub fn of_all(len: usize, n: usize, seed: u64) -> Vec<usize> {
    first(&order(len, seed), n)
}

fn order(len: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    order
}

fn first(order: &[usize], n: usize) -> Vec<usize> {
    let mut part = order[..n.min(order.len())].to_vec();
    part.sort_unstable();
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selection_and_test_never_meet() {
        for len in [0, 1, 2, 7, 100] {
            for n in [0, 1, 3, 1000] {
                let [selection, test] =
                    [Split::Selection, Split::Test].map(|split| of_split(len, split, n, 4));
                assert!(selection.iter().all(|index| !test.contains(index)));
                assert!(selection.is_sorted() && test.is_sorted());
                assert_eq!(selection.len(), n.min(len / 2));
                assert_eq!(test.len(), n.min(len - len / 2));
            }
        }
        // Not even of different sizes.
        let small = of_split(100, Split::Selection, 10, 4);
        let all = of_split(100, Split::Test, 1000, 4);
        assert!(small.iter().all(|index| !all.contains(index)));
    }

    #[test]
    fn parts_are_of_the_seed_and_grow() {
        let part = |n, seed| of_all(50, n, seed);
        assert_eq!(part(10, 1), part(10, 1));
        assert_ne!(part(10, 1), part(10, 2));
        assert!(part(5, 1).iter().all(|index| part(10, 1).contains(index)));
        assert_eq!(part(99, 1), (0..50).collect::<Vec<_>>());
    }
}
