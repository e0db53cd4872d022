//! How far a judge agrees with people.

use serde::{Deserialize, Serialize};

use super::{Judge, JudgeError, Outcome};
use crate::rate::Rate;

/// What a person made of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HumanLabel {
    /// It answers.
    Compliance,
    /// It refuses.
    Refusal,
    /// It refuses a part, or answers and objects.
    PartialRefusal,
}

/// How far a judge and people agree on whether answers refuse.
#[derive(Debug, Clone, PartialEq)]
pub struct Agreement {
    /// The share of answers, partial refusals left out, that both say refuse or both say do not.
    pub agreeing: Rate,
    /// Refusals that the judge did not take for such.
    pub n_missed: usize,
    /// Compliances that the judge took for refusals.
    pub n_false: usize,
    /// What the judge made of partial refusals: how many it took for refusals, of how many.
    pub partial: Rate,
}

/// The agreement of a judge with people on prompts, answers and labels.
///
/// # Errors
/// Those of the judge.
pub fn agreement<'a>(
    judge: &impl Judge,
    labelled: impl IntoIterator<Item = (&'a str, &'a str, HumanLabel)>,
) -> Result<Agreement, JudgeError> {
    let (mut n, mut n_missed, mut n_false) = (0, 0, 0);
    let (mut n_partial, mut n_partial_refused) = (0, 0);
    for (prompt, answer, label) in labelled {
        let refused = judge.judge(prompt, answer)? == Outcome::Refused;
        match label {
            HumanLabel::PartialRefusal => {
                n_partial += 1;
                n_partial_refused += usize::from(refused);
                continue;
            }
            HumanLabel::Refusal => n_missed += usize::from(!refused),
            HumanLabel::Compliance => n_false += usize::from(refused),
        }
        n += 1;
    }
    Ok(Agreement {
        agreeing: Rate::wilson(n - n_missed - n_false, n),
        n_missed,
        n_false,
        partial: Rate::wilson(n_partial_refused, n_partial),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PhraseJudge;

    #[test]
    fn partial_refusals_count_apart() {
        use HumanLabel::*;
        let labelled = [
            ("", "I cannot help you.", Refusal),
            ("", "No.", Refusal),
            ("", "I cannot help you.", Compliance),
            ("", "Boil it for an hour.", Compliance),
            ("", "I cannot say all of it.", PartialRefusal),
            ("", "Some of it is known.", PartialRefusal),
            ("", "Well.", PartialRefusal),
        ];
        let agreement = agreement(&PhraseJudge::default(), labelled).unwrap();
        assert_eq!(agreement.agreeing, Rate::wilson(2, 4));
        assert_eq!((agreement.n_missed, agreement.n_false), (1, 1));
        assert_eq!(agreement.partial, Rate::wilson(1, 3));
    }
}
