//! Rows that are left out because they are far longer than most.

use serde::{Deserialize, Serialize};

use crate::source::Rows;

/// What is left out, and how much was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::train) struct Outliers {
    /// The largest norm that stays, for each column, as bits: JSON would round it.
    limits: Vec<u64>,
    /// Rows left out so far.
    pub(in crate::train) n_left_out: u64,
    /// Whether the stream has ended, and so the run with it.
    pub(in crate::train) has_ended: bool,
}

impl Outliers {
    /// Leaves out what is longer than `max_norm` times the median of a sample, in one of the columns
    /// that are used.
    pub(super) fn new(sample: &Rows, used: &[usize], max_norm: f64) -> Self {
        let limit = |column: usize| {
            let mut norms: Vec<f64> = sample.norms(column).collect();
            norms.sort_by(f64::total_cmp);
            match norms.get(norms.len() / 2) {
                // Beside zeros alone, everything else would be an outlier.
                Some(&median) if used.contains(&column) && median > 0.0 => max_norm * median,
                _ => f64::INFINITY,
            }
        };
        let limits = (0..sample.n_columns()).map(|column| limit(column).to_bits()).collect();
        Self { limits, n_left_out: 0, has_ended: false }
    }

    /// Takes outliers out of the rows from this one on, and counts them. Rows without a finite norm
    /// stay: those are for the step to find.
    pub(super) fn leave_out(&mut self, rows: &mut Rows, from: usize) {
        let limits: Vec<f64> = self.limits.iter().map(|&bits| f64::from_bits(bits)).collect();
        let mut stays = vec![true; rows.n_rows()];
        for (column, &limit) in limits.iter().enumerate().filter(|(_, limit)| limit.is_finite()) {
            let norms = rows.norms(column).enumerate().skip(from);
            norms.for_each(|(row, norm)| stays[row] &= !(norm > limit && norm.is_finite()));
        }
        self.n_left_out += rows.retain(&stays) as u64;
    }

    /// The same for another stream, of which nothing has been left out yet.
    pub(super) fn uncounted(&self) -> Self {
        Self { n_left_out: 0, ..self.clone() }
    }

    /// Whether it is about so many columns.
    pub(super) fn fits(&self, n_columns: usize) -> bool {
        self.limits.len() == n_columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Column;

    fn rows(x: &[f32], y: &[f32]) -> Rows {
        let columns = [Column::new("x", 2), Column::new("y", 1)];
        let x = x.iter().flat_map(|&x| [0.6 * x, -0.8 * x]).collect();
        Rows::new(&columns, vec![x, y.to_vec()]).expect("whole rows")
    }

    #[test]
    fn what_is_far_longer_than_most_is_left_out_and_counted() {
        let sample = rows(&[1.0, 2.0, 3.0], &[5.0, 5.0, 5.0]);
        let (n, inf) = (f32::NAN, f32::INFINITY);
        let mut outliers = Outliers::new(&sample, &[0], 4.0);
        // 8 is the limit of x; nothing looks at y.
        let mut some = rows(&[9.0, 7.9, 9.0, 8.1, n, inf], &[1.0, 2.0, 900.0, 3.0, 4.0, 5.0]);
        outliers.leave_out(&mut some, 1);
        assert_eq!((some.column(1), outliers.n_left_out), (&[1.0, 2.0, 4.0, 5.0][..], 2));
        assert_eq!(some.column(0).len(), 8);
        let mut both = Outliers::new(&sample, &[0, 1], 4.0);
        let mut some = rows(&[1.0, 9.0], &[21.0, 1.0]);
        both.leave_out(&mut some, 0);
        assert_eq!((some.n_rows(), both.n_left_out), (0, 2));
        // Of zeros, nothing is far away.
        let mut zeros = Outliers::new(&rows(&[0.0; 3], &[0.0; 3]), &[0, 1], 4.0);
        let mut some = rows(&[1.0], &[1.0]);
        zeros.leave_out(&mut some, 0);
        assert_eq!(some.n_rows(), 1);
    }
}
