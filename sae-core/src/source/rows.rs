//! Rows of activations in memory.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::error::SourceError;

/// One of the activations that a row holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Column {
    /// Its name: the hook point, as a rule.
    pub name: String,
    /// Values per row.
    pub width: usize,
}

impl Column {
    /// A column of this name and width.
    pub fn new(name: impl Into<String>, width: usize) -> Self {
        Self { name: name.into(), width }
    }
}

/// Columns in words, for errors.
pub(crate) fn in_words(columns: &[Column]) -> String {
    let words: Vec<_> = columns.iter().map(|c| format!("{} [{}]", c.name, c.width)).collect();
    words.join(", ")
}

/// Where the column of this name is.
pub(crate) fn column_idx(columns: &[Column], name: &str) -> Result<usize, SourceError> {
    columns.iter().position(|column| column.name == name).ok_or_else(|| SourceError::NoColumn {
        column: name.to_owned(),
        present: in_words(columns),
    })
}

/// Some rows, column by column.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rows {
    n_rows: usize,
    columns: Vec<Values>,
}

#[derive(Debug, Clone, PartialEq)]
struct Values {
    width: usize,
    values: Vec<f32>,
}

impl Rows {
    /// No rows yet, of these columns.
    pub fn empty(columns: &[Column]) -> Self {
        let columns = columns.iter().map(|c| Values { width: c.width, values: Vec::new() });
        Self { n_rows: 0, columns: columns.collect() }
    }

    /// From the values of each column, row after row.
    ///
    /// # Errors
    /// If they make no whole rows, or not equally many.
    pub fn new(columns: &[Column], values: Vec<Vec<f32>>) -> Result<Self, SourceError> {
        if columns.len() != values.len() {
            let actual = format!("{} unnamed ones", values.len());
            return Err(SourceError::Columns { expected: in_words(columns), actual });
        }
        let n_rows = match (columns.first(), values.first()) {
            (Some(column), Some(values)) => values.len() / column.width.max(1),
            _ => 0,
        };
        let mut rows = Self::empty(columns);
        for ((column, into), values) in columns.iter().zip(&mut rows.columns).zip(values) {
            let (width, actual) = (column.width, values.len());
            let expected = n_rows * width;
            if width == 0 || actual != expected {
                let column = column.name.clone();
                return Err(SourceError::Values { column, width, expected, actual });
            }
            into.values = values;
        }
        Ok(Self { n_rows, ..rows })
    }

    /// How many.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// How many columns.
    pub fn n_columns(&self) -> usize {
        self.columns.len()
    }

    /// The width of a column.
    ///
    /// # Panics
    /// If there is no such column.
    pub fn width(&self, column_idx: usize) -> usize {
        self.columns[column_idx].width
    }

    /// All values of a column, row after row.
    ///
    /// # Panics
    /// If there is no such column.
    pub fn column(&self, column_idx: usize) -> &[f32] {
        &self.columns[column_idx].values
    }

    /// Whether the rows hold what these columns say.
    pub fn fits(&self, columns: &[Column]) -> bool {
        self.columns.iter().map(|c| c.width).eq(columns.iter().map(|c| c.width))
    }

    /// Forgets the rows and keeps their memory.
    pub fn clear(&mut self) {
        self.n_rows = 0;
        self.columns.iter_mut().for_each(|column| column.values.clear());
    }

    /// Appends rows of another one.
    ///
    /// # Panics
    /// If that one has other columns, or not those rows.
    pub fn extend(&mut self, from: &Self, rows: Range<usize>) {
        assert_eq!(self.columns.len(), from.columns.len(), "rows of other columns");
        self.n_rows += rows.len();
        for (into, from) in self.columns.iter_mut().zip(&from.columns) {
            assert_eq!(into.width, from.width, "rows of other columns");
            into.values.extend(&from.values[rows.start * from.width..rows.end * from.width]);
        }
    }

    /// Appends the first `n` of these to another one, as far as there are so many, and says how many
    /// there were. When none is left, their memory is given back.
    pub(crate) fn move_to(&mut self, into: &mut Self, n: usize) -> usize {
        let n = n.min(self.n_rows);
        if n > 0 {
            into.extend(self, 0..n);
            self.n_rows -= n;
            for column in &mut self.columns {
                column.values.drain(..n * column.width);
                if self.n_rows == 0 {
                    column.values = Vec::new();
                }
            }
        }
        n
    }

    /// The Euclidean norm of every row in a column.
    pub(crate) fn norms(&self, column_idx: usize) -> impl Iterator<Item = f64> {
        let Values { width, values } = &self.columns[column_idx];
        values
            .chunks(*width)
            .map(|row| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt())
    }

    /// Drops the rows that are not to stay, and says how many.
    pub(crate) fn retain(&mut self, stays: &[bool]) -> usize {
        assert_eq!(stays.len(), self.n_rows, "one word for each row");
        let n_dropped = stays.iter().filter(|stays| !**stays).count();
        if n_dropped > 0 {
            for Values { width, values } in &mut self.columns {
                let mut at = 0..;
                values.retain(|_| stays[at.next().expect("endless") / *width]);
            }
            self.n_rows -= n_dropped;
        }
        n_dropped
    }

    /// Appends a row, whose values are pushed column by column.
    pub(crate) fn push_with(&mut self, mut fill: impl FnMut(usize, &mut Vec<f32>)) {
        self.n_rows += 1;
        for (column_idx, column) in self.columns.iter_mut().enumerate() {
            fill(column_idx, &mut column.values);
            debug_assert_eq!(column.values.len(), self.n_rows * column.width);
        }
    }

    /// Puts a row of another one in the place of one of these.
    pub(crate) fn replace(&mut self, row: usize, from: &Self, from_row: usize) {
        for (into, from) in self.columns.iter_mut().zip(&from.columns) {
            let width = into.width;
            into.values[row * width..][..width]
                .copy_from_slice(&from.values[from_row * width..][..width]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns() -> [Column; 2] {
        [Column::new("x", 2), Column::new("y", 1)]
    }

    #[test]
    fn columns_of_a_row_stay_together() {
        let rows = Rows::new(&columns(), vec![vec![1.0, 2.0, 3.0, 4.0], vec![5.0, 6.0]]);
        let rows = rows.expect("two rows");
        let mut other = Rows::empty(&columns());
        other.extend(&rows, 1..2);
        other.extend(&rows, 0..2);
        assert_eq!((other.n_rows(), other.width(0)), (3, 2));
        assert_eq!(other.column(0), [3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(other.column(1), [6.0, 5.0, 6.0]);
        other.replace(0, &rows, 0);
        assert_eq!((&other.column(0)[..2], other.column(1)[0]), (&[1.0, 2.0][..], 5.0));
        let mut rest = rows.clone();
        let mut taken = Rows::empty(&columns());
        assert_eq!((rest.move_to(&mut taken, 1), rest.n_rows()), (1, 1));
        assert_eq!((taken.column(0), rest.column(1)), (&[1.0, 2.0][..], &[6.0][..]));
        assert_eq!((rest.move_to(&mut taken, 5), rest.move_to(&mut taken, 5)), (1, 0));
        assert_eq!(taken, rows);
        other.clear();
        assert_eq!((other.n_rows(), other.column(0)), (0, &[][..]));
    }

    #[test]
    fn rows_that_do_not_fit_are_refused() {
        let ragged = |x: usize, y: usize| {
            Rows::new(&columns(), vec![vec![0.0; x], vec![0.0; y]]).unwrap_err().to_string()
        };
        assert_eq!(ragged(3, 1), "column x of width 2 has 3 values, expected 2");
        assert_eq!(ragged(4, 3), "column y of width 1 has 3 values, expected 2");
        let one = Rows::new(&columns(), vec![Vec::new()]).unwrap_err().to_string();
        assert_eq!(one, "rows of the columns 1 unnamed ones, expected x [2], y [1]");
        let empty = Rows::new(&[Column::new("x", 0)], vec![Vec::new()]);
        assert!(matches!(empty, Err(SourceError::Values { width: 0, .. })));
    }
}
