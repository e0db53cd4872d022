//! A buffer that mixes a stream over a longer distance than it comes in.

use rand::seq::SliceRandom;

use super::error::SourceError;
use super::rows::{Column, Rows};
use super::{ActivationSource, Behind, Position};
use crate::train::random_stream;

/// Rows that are on their way into the buffer at a time.
const BLOCK: usize = 1024;

/// How a [`MixingBuffer`] mixes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mixing {
    /// Rows that the buffer holds when it is full.
    pub capacity: usize,
    /// The share of them that stays for the next filling.
    pub share: f64,
    /// Decides the order.
    pub seed: u64,
}

/// Another source, shuffled.
///
/// The buffer is filled, shuffled, and given out up to the share that it keeps; then it is filled
/// up and shuffled again. When the stream behind ends it is given out whole, so every row comes
/// exactly once.
///
/// Its position holds the rows in the buffer: a checkpoint grows by them.
#[derive(Debug, Clone)]
pub struct MixingBuffer<S> {
    source: S,
    mixing: Mixing,
    /// Rows in the slots that `order` names, and of no meaning in the others.
    slots: Rows,
    /// Slots of the rows to come, the next one last.
    order: Vec<u32>,
    /// Rows that stay for the next filling.
    n_kept: usize,
    filling: u64,
    given: u64,
    source_ended: bool,
}

impl<S: ActivationSource> MixingBuffer<S> {
    /// # Errors
    /// If the share is none, or leaves nothing to give.
    pub fn new(source: S, mixing: Mixing) -> Result<Self, SourceError> {
        let Mixing { capacity, share, .. } = mixing;
        let refused = |expected| Err(SourceError::Mixing { capacity, share, expected });
        if u32::try_from(capacity).is_err() {
            return refused("rows that are counted in 32 bits");
        }
        if !(0.0..1.0).contains(&share) {
            return refused("a share from 0 to below 1");
        }
        let n_kept = (share * capacity as f64) as usize;
        if n_kept >= capacity {
            return refused("at least one row to give");
        }
        let slots = Rows::empty(source.columns());
        Ok(Self {
            source,
            mixing,
            slots,
            order: Vec::new(),
            n_kept,
            filling: 0,
            given: 0,
            source_ended: false,
        })
    }

    /// Fills the free slots from the stream and shuffles all.
    fn fill(&mut self) -> Result<(), SourceError> {
        let capacity = self.mixing.capacity;
        let wanted = capacity - self.order.len();
        let n_slots = self.slots.n_rows();
        let appended = self.source.read(capacity - n_slots, &mut self.slots)?;
        let mut new: Vec<u32> = (n_slots..n_slots + appended).map(|slot| slot as u32).collect();
        if n_slots + appended == capacity {
            let mut taken = vec![false; n_slots];
            self.order.iter().for_each(|&slot| taken[slot as usize] = true);
            let free: Vec<usize> = (0..n_slots).filter(|&slot| !taken[slot]).collect();
            let mut fresh = Rows::empty(self.source.columns());
            for free in free[..wanted - appended].chunks(BLOCK) {
                fresh.clear();
                let n_read = self.source.read(free.len(), &mut fresh)?;
                for (row, &slot) in free[..n_read].iter().enumerate() {
                    self.slots.replace(slot, &fresh, row);
                    new.push(slot as u32);
                }
            }
        }
        self.source_ended = new.len() < wanted;
        self.order.extend(new);
        self.filling += 1;
        self.given = 0;
        self.order.shuffle(&mut random_stream(self.mixing.seed, self.filling));
        Ok(())
    }
}

impl<S: ActivationSource> ActivationSource for MixingBuffer<S> {
    fn columns(&self) -> &[Column] {
        self.source.columns()
    }

    fn n_rows(&self) -> Option<u64> {
        self.source.n_rows()
    }

    fn fingerprint(&self) -> String {
        let Mixing { capacity, share, seed } = self.mixing;
        let behind = self.source.fingerprint();
        format!("{behind}, mixed in {capacity} rows keeping {share} with seed {seed}")
    }

    fn read(&mut self, n: usize, rows: &mut Rows) -> Result<usize, SourceError> {
        let mut n_read = 0;
        while n_read < n {
            let left = if self.source_ended { 0 } else { self.n_kept };
            if self.order.len() <= left {
                if self.source_ended {
                    break;
                }
                self.fill()?;
                continue;
            }
            let slot = self.order.pop().expect("more than none") as usize;
            rows.extend(&self.slots, slot..slot + 1);
            self.given += 1;
            n_read += 1;
        }
        Ok(n_read)
    }

    fn position(&self) -> Position {
        let mut held = Rows::empty(self.source.columns());
        for &slot in &self.order {
            held.extend(&self.slots, slot as usize..slot as usize + 1);
        }
        let behind = Behind { position: self.source.position(), held };
        Position { part: self.filling, row: self.given, behind: Some(Box::new(behind)) }
    }

    fn seek(&mut self, position: &Position) -> Result<(), SourceError> {
        let Some(behind) = position.behind.as_deref() else {
            return Err(position.refused("what is held in the buffer"));
        };
        let (held, capacity) = (&behind.held, self.mixing.capacity);
        // Whether a filling fell short shows in its size: given and held rows are all of it.
        let filled = position.row.saturating_add(held.n_rows() as u64);
        let is_possible = filled <= capacity as u64 && position.part < u64::MAX;
        if !is_possible || !held.fits(self.source.columns()) {
            return Err(position.refused(format!("at most {capacity} rows of its columns held")));
        }
        self.source.seek(&behind.position)?;
        self.slots = held.clone();
        self.order = (0..held.n_rows() as u32).collect();
        (self.filling, self.given) = (position.part, position.row);
        self.source_ended = position.part > 0 && filled < capacity as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Chunks;
    use std::convert::Infallible;

    fn counting(n: u64) -> impl ActivationSource {
        let columns = vec![Column::new("x", 2), Column::new("y", 1)];
        let of = columns.clone();
        Chunks::new(columns, "counting", move |chunk| {
            let ids: Vec<u64> = (chunk * 7..(chunk * 7 + 7).min(n)).collect();
            let x = ids.iter().flat_map(|&id| [id as f32, -(id as f32)]).collect();
            let y = ids.iter().map(|&id| id as f32).collect();
            let rows = Rows::new(&of, vec![x, y]).expect("whole rows");
            Ok::<_, Infallible>((!ids.is_empty()).then_some(rows))
        })
        .with_n_rows(n)
    }

    fn buffer(n: u64, capacity: usize, share: f64) -> MixingBuffer<impl ActivationSource> {
        MixingBuffer::new(counting(n), Mixing { capacity, share, seed: 3 }).expect("possible")
    }

    fn read(source: &mut impl ActivationSource, n: usize) -> Vec<u32> {
        let mut rows = Rows::empty(source.columns());
        source.read(n, &mut rows).expect("reads");
        let pairs = rows.column(0).chunks(2).zip(rows.column(1));
        assert!(pairs.into_iter().all(|(x, &y)| x == [y, -y]), "columns were torn apart");
        rows.column(1).iter().map(|&id| id as u32).collect()
    }

    #[test]
    fn every_row_comes_once_and_in_another_order() {
        for (n, capacity, share) in [(100, 16, 0.5), (100, 300, 0.5), (5, 1, 0.0), (64, 16, 0.9)] {
            let mut ids = read(&mut buffer(n, capacity, share), 1000);
            let sorted: Vec<u32> = (0..n as u32).collect();
            assert!(capacity == 1 || ids != sorted, "{n} {capacity} {share}");
            ids.sort_unstable();
            assert_eq!(ids, sorted, "{n} {capacity} {share}");
        }
    }

    #[test]
    fn the_share_that_is_kept_is_set() {
        let ids = read(&mut buffer(100, 20, 0.25), 100);
        // 15 of the first 20, then 15 of the 5 that stayed and the next 15.
        assert!(ids[..15].iter().all(|&id| id < 20));
        assert!(ids[15..30].iter().all(|&id| id < 35));
        let stayed = ids[15..].iter().filter(|&&id| id < 20).count();
        assert_eq!(stayed, 5);
    }

    #[test]
    fn every_place_can_be_gone_back_to() {
        for n in 0..=60 {
            let mut whole = buffer(60, 16, 0.4);
            read(&mut whole, n);
            let position = whole.position();
            let rest = read(&mut whole, 100);
            for mut other in [whole, buffer(60, 16, 0.4)] {
                other.seek(&position).expect("a place");
                assert_eq!(other.position(), position);
                assert_eq!(read(&mut other, 100), rest, "after {n}");
            }
        }
    }

    #[test]
    fn impossible_buffers_are_refused() {
        for (capacity, share) in [(0, 0.0), (10, 1.0), (10, -0.1), (10, f64::NAN)] {
            let mixing = Mixing { capacity, share, seed: 0 };
            let error = MixingBuffer::new(counting(5), mixing).err().expect("refused");
            assert!(matches!(error, SourceError::Mixing { .. }), "{capacity} {share}");
        }
        let error = buffer(5, 4, 0.0).seek(&Position::new(1, 0)).unwrap_err();
        assert!(error.to_string().ends_with("expected what is held in the buffer"));
    }
}
