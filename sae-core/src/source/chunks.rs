//! Activations that are made while they are used.

use super::error::SourceError;
use super::rows::{Column, Rows, in_words};
use super::{ActivationSource, Position};

/// A stream made chunk by chunk by a function of the chunk's number: by running a model on the
/// texts of that number, for one. The same number has to give the same rows; a run that goes on
/// after an interruption asks again for the chunk that it stood in.
///
/// ```no_run
/// # use std::ops::ControlFlow;
/// # use model_hooks::{ForwardError, HarvestConfig, LanguageModel, SharedPrefix};
/// # use sae_core::source::{Chunks, Column, Rows};
/// # fn f(model: &LanguageModel, texts: &[Vec<u32>], config: &HarvestConfig) {
/// let width = model.config().d_model;
/// let columns: Vec<Column> =
///     config.points.iter().map(|point| Column::new(point.to_string(), width)).collect();
/// let of = columns.clone();
/// let source = Chunks::new(columns, "SmolLM2-135M on our texts, from position 1", |chunk| {
///     let Some(texts) = texts.chunks(64).nth(chunk as usize) else {
///         return Ok(None);
///     };
///     let mut rows = Rows::empty(&of);
///     model.harvest(texts, &SharedPrefix::default(), config, |harvested| {
///         let values = harvested.activations.into_iter();
///         let values = values.map(|x| x.into_data().try_into_vec_as().expect("activations are f32"));
///         let harvested = Rows::new(&of, values.collect()).expect("all points are that wide");
///         rows.extend(&harvested, 0..harvested.n_rows());
///         ControlFlow::Continue(())
///     })?;
///     Ok::<_, ForwardError>(Some(rows))
/// });
/// # }
/// ```
pub struct Chunks<F> {
    columns: Vec<Column>,
    fingerprint: String,
    n_rows: Option<u64>,
    make: F,
    position: Position,
    /// The chunk of `position.part`, once it has been made.
    current: Option<Rows>,
}

impl<F, E> Chunks<F>
where
    F: FnMut(u64) -> Result<Option<Rows>, E>,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// A stream that ends where `make` gives `None`; `fingerprint` has to tell the model, the texts
    /// and all else that shapes the rows.
    pub fn new(columns: Vec<Column>, fingerprint: impl Into<String>, make: F) -> Self {
        let fingerprint = fingerprint.into();
        let position = Position::default();
        Self { columns, fingerprint, n_rows: None, make, position, current: None }
    }

    /// The same stream, known to have this many rows.
    pub fn with_n_rows(self, n_rows: u64) -> Self {
        Self { n_rows: Some(n_rows), ..self }
    }

    /// Makes the chunk that the position is in, if that is not done, and says whether there is one.
    fn make_current(&mut self) -> Result<bool, SourceError> {
        if self.current.is_some() {
            return Ok(true);
        }
        let chunk = self.position.part;
        let failed = |source: E| SourceError::Chunk { chunk, source: source.into() };
        let Some(rows) = (self.make)(chunk).map_err(failed)? else {
            return Ok(false);
        };
        if !rows.fits(&self.columns) {
            let widths: Vec<_> = (0..rows.n_columns()).map(|c| rows.width(c)).collect();
            let (expected, actual) = (in_words(&self.columns), format!("of widths {widths:?}"));
            return Err(SourceError::Columns { expected, actual });
        }
        if self.position.row > rows.n_rows() as u64 {
            return Err(self.position.refused(format!("at most {} rows", rows.n_rows())));
        }
        self.current = Some(rows);
        Ok(true)
    }
}

impl<F, E> ActivationSource for Chunks<F>
where
    F: FnMut(u64) -> Result<Option<Rows>, E>,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    fn columns(&self) -> &[Column] {
        &self.columns
    }

    fn n_rows(&self) -> Option<u64> {
        self.n_rows
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }

    fn read(&mut self, n: usize, rows: &mut Rows) -> Result<usize, SourceError> {
        let mut n_read = 0;
        while n_read < n && self.make_current()? {
            let chunk = self.current.as_ref().expect("it has just been made");
            let row = self.position.row as usize;
            let taken = (chunk.n_rows() - row).min(n - n_read);
            rows.extend(chunk, row..row + taken);
            n_read += taken;
            self.position.row += taken as u64;
            if row + taken == chunk.n_rows() {
                self.position = Position::new(self.position.part + 1, 0);
                self.current = None;
            }
        }
        Ok(n_read)
    }

    fn position(&self) -> Position {
        self.position.clone()
    }

    fn seek(&mut self, position: &Position) -> Result<(), SourceError> {
        if position.behind.is_some() {
            return Err(position.refused("nothing behind the chunks"));
        }
        if position.part != self.position.part {
            self.current = None;
        }
        if let Some(chunk) = &self.current
            && position.row > chunk.n_rows() as u64
        {
            return Err(position.refused(format!("at most {} rows", chunk.n_rows())));
        }
        self.position = position.clone();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    /// Chunks of 0, 1, 2, … rows that count up, five of them.
    fn counting() -> Chunks<impl FnMut(u64) -> Result<Option<Rows>, Infallible>> {
        let columns = vec![Column::new("x", 1)];
        let of = columns.clone();
        Chunks::new(columns, "counting", move |chunk| {
            let first = chunk * chunk.saturating_sub(1) / 2;
            let values = (first..first + chunk).map(|x| x as f32).collect();
            Ok((chunk < 5).then(|| Rows::new(&of, vec![values]).expect("whole rows")))
        })
    }

    fn read(source: &mut impl ActivationSource, n: usize) -> Vec<f32> {
        let mut rows = Rows::empty(source.columns());
        let n_read = source.read(n, &mut rows).expect("reads");
        assert_eq!(n_read, rows.n_rows());
        rows.column(0).to_vec()
    }

    #[test]
    fn chunks_follow_each_other() {
        let mut source = counting();
        assert_eq!(read(&mut source, 4), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(source.position(), Position::new(3, 1));
        assert_eq!(read(&mut source, 100), [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
        assert!(read(&mut source, 1).is_empty());
    }

    #[test]
    fn every_place_can_be_gone_back_to() {
        for n in 0..=10 {
            let mut source = counting();
            read(&mut source, n);
            let position = source.position();
            let rest = read(&mut source, 100);
            for mut other in [source, counting()] {
                other.seek(&position).expect("a place");
                assert_eq!(read(&mut other, 100), rest, "after {n}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut source = counting();
        source.seek(&Position::new(2, 3)).expect("not known before it is made");
        let error = source.read(1, &mut Rows::empty(source.columns())).unwrap_err();
        let expected = "row 3 of part 2 is no place in this stream: expected at most 2 rows";
        assert_eq!(error.to_string(), expected);
        let columns = vec![Column::new("x", 2)];
        let mut failing = Chunks::new(columns.clone(), "", |_| Err::<Option<Rows>, _>("no model"));
        let error = failing.read(1, &mut Rows::empty(&columns)).unwrap_err();
        assert!(matches!(error, SourceError::Chunk { chunk: 0, .. }), "{error}");
        let narrow = Rows::new(&[Column::new("x", 1)], vec![vec![0.0]]).expect("a row");
        let mut narrow =
            Chunks::new(columns.clone(), "", |_| Ok::<_, Infallible>(Some(narrow.clone())));
        let error = narrow.read(1, &mut Rows::empty(&columns)).unwrap_err();
        assert_eq!(error.to_string(), "rows of the columns of widths [1], expected x [2]");
    }
}
