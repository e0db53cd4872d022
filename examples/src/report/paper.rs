//! The table that the paper has: what each method does to refusing, and what to everything else.

use serde::Serialize;
use steering::Rate;

use crate::results::{Capability, Method, Row, Treatment};

/// Columns that were measured of any row, and the rows that have some of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Layout {
    /// Sets of questions, in the order in which they were met.
    questions: Vec<String>,
    /// The set of word problems.
    arithmetic: Option<String>,
    has_multi_turn: bool,
    rows: Vec<LayoutRow>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct LayoutRow {
    treatment: Treatment,
    is_control: bool,
    unsafe_rate: Rate,
    safe_rate: Rate,
    multi_turn: Option<Rate>,
    /// One for each set of questions.
    questions: Vec<Option<Scored>>,
    arithmetic: Option<Scored>,
    perplexity_ratio: f64,
}

/// A share that is right, and how it differs from that of the model left alone, in points.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Scored {
    rate: Rate,
    change: Option<f64>,
}

/// `None` where neither capabilities nor conversations were measured.
pub(super) fn layout(rows: &[&Row]) -> Option<Layout> {
    let measured: Vec<&&Row> =
        rows.iter().filter(|row| row.capability.is_some() || row.multi_turn.is_some()).collect();
    let capabilities = || measured.iter().filter_map(|row| row.capability.as_ref());
    let mut questions: Vec<String> = Vec::new();
    for set in capabilities().flat_map(|capability| &capability.multiple_choice) {
        if !questions.contains(&set.set) {
            questions.push(set.set.clone());
        }
    }
    let arithmetic =
        capabilities().find_map(|capability| capability.arithmetic.as_ref()).map(|a| a.set.clone());
    let base = measured.iter().find(|row| row.treatment.method == Method::Base);
    let scored = |row: &Row, share: &dyn Fn(&Capability) -> Option<Rate>| {
        let rate = share(row.capability.as_ref()?)?;
        let base = base.and_then(|row| share(row.capability.as_ref()?));
        let is_base = row.treatment.method == Method::Base;
        let change = base.filter(|_| !is_base).map(|base| 100.0 * (rate.rate - base.rate));
        Some(Scored { rate, change })
    };
    let layout_rows = measured.iter().map(|row| LayoutRow {
        treatment: row.treatment,
        is_control: row.treatment.method.is_control(),
        unsafe_rate: row.unsafe_rate,
        safe_rate: row.safe_rate,
        multi_turn: row.multi_turn.as_ref().map(|it| it.attack_success),
        questions: questions
            .iter()
            .map(|name| {
                scored(row, &|capability| {
                    let mut sets = capability.multiple_choice.iter();
                    sets.find(|set| set.set == *name).map(|set| set.accuracy)
                })
            })
            .collect(),
        arithmetic: scored(row, &|capability| capability.arithmetic.as_ref().map(|a| a.correct)),
        perplexity_ratio: row.perplexity_ratio,
    });
    let rows: Vec<LayoutRow> = layout_rows.collect();
    let has_multi_turn = rows.iter().any(|row| row.multi_turn.is_some());
    (!rows.is_empty()).then_some(Layout { questions, arithmetic, has_multi_turn, rows })
}
