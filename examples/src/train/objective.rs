//! Kinds of SAEs as a user names them.

use sae_core::train::{
    AuxK, AuxKTarget, Gated, GatedAuxiliary, Group, JumpRelu, Kind, L0Loss, MatchingPursuit,
    RunningThreshold, Selecting, Selection, Sparsity, SparsityNorm, Standard,
};
use serde::Deserialize;

/// Begins at the first value and follows within some twenty steps, so that short runs end with a
/// threshold too; SAELens' begins at zero and takes hundreds.
const THRESHOLD: RunningThreshold =
    RunningThreshold::DictionaryLearning { beta: 0.95, start_step: 0 };

/// The kind of SAE, and what it minimises besides the error.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// The `k` largest latents of each activation.
    TopK {
        /// How many.
        k: usize,
        /// Whether dead latents are trained on what is left over.
        #[serde(default = "yes")]
        aux_k: bool,
    },
    /// TopK whose loss looks at `4k` latents as well.
    MultiTopK {
        /// How many.
        k: usize,
        /// Whether dead latents are trained on what is left over.
        #[serde(default = "yes")]
        aux_k: bool,
    },
    /// The `k` latents of largest magnitude, which may be negative.
    AbsTopK {
        /// How many.
        k: usize,
        /// Whether dead latents are trained on what is left over.
        #[serde(default = "yes")]
        aux_k: bool,
    },
    /// `k` latents for each activation of a batch, on average.
    BatchTopK {
        /// How many.
        k: f64,
        /// Whether dead latents are trained on what is left over.
        #[serde(default = "yes")]
        aux_k: bool,
    },
    /// BatchTopK whose first latents have to reconstruct alone.
    Matryoshka {
        /// Latents for each activation, on average.
        k: f64,
        /// How many latents each reconstruction has; one with all is added if it is not there.
        widths: Vec<usize>,
        /// Whether dead latents are trained on what is left over.
        #[serde(default = "yes")]
        aux_k: bool,
    },
    /// Thresholds that are trained.
    JumpRelu {
        /// The weight of the number of latents.
        l0_coefficient: f64,
        /// The number that is aimed at; as few as can be if not given.
        #[serde(default)]
        l0_target: Option<f64>,
    },
    /// A penalty on the sizes of latents.
    Standard {
        /// Its weight.
        l1_coefficient: f64,
        /// Of the norm that is penalised: 1 is L1, and below it is closer to a count.
        #[serde(default = "one")]
        p: f64,
        /// Whether that norm is penalised to the power of `p`.
        #[serde(default)]
        to_the_p: bool,
        /// Whether latents count as much as they write. If not, hold the decoder's rows.
        #[serde(default = "yes")]
        weighted_by_decoder_norms: bool,
    },
    /// Gates, with a penalty, and magnitudes.
    Gated {
        /// The penalty's weight.
        l1_coefficient: f64,
        /// Whether what gates alone reconstruct trains the decoder too.
        #[serde(default = "detached")]
        auxiliary: GatedAuxiliary,
    },
    /// The decoder's own rows, picked one by one.
    MatchingPursuit {
        /// It ends where the norm of what is left is below this.
        residual_threshold: f64,
        /// Picks for each activation, at most; as many as its width if not given.
        #[serde(default)]
        max_iterations: Option<usize>,
    },
    /// As the library has it, in full.
    Custom(Box<sae_core::train::Objective>),
}

fn yes() -> bool {
    true
}

fn one() -> f64 {
    1.0
}

fn detached() -> GatedAuxiliary {
    GatedAuxiliary::DetachedDecoder
}

impl Objective {
    /// What the kind is called.
    pub fn label(&self) -> String {
        match self {
            Self::TopK { k, .. } => format!("TopK {k}"),
            Self::MultiTopK { k, .. } => format!("Multi-TopK {k}"),
            Self::AbsTopK { k, .. } => format!("AbsTopK {k}"),
            Self::BatchTopK { k, .. } => format!("BatchTopK {k}"),
            Self::Matryoshka { k, .. } => format!("Matryoshka {k}"),
            Self::JumpRelu { l0_target: Some(target), .. } => format!("JumpReLU, L0 → {target}"),
            Self::JumpRelu { l0_coefficient, .. } => format!("JumpReLU {l0_coefficient}"),
            Self::Standard { l1_coefficient, p, .. } => format!("L{p} {l1_coefficient}"),
            Self::MatchingPursuit { .. } => "Matching pursuit".to_owned(),
            Self::Gated { l1_coefficient, .. } => format!("Gated {l1_coefficient}"),
            Self::Custom(_) => "custom".to_owned(),
        }
    }

    /// As the library has it.
    pub fn of(&self, d_sae: usize) -> sae_core::train::Objective {
        let selecting = |selection, aux_k: bool, threshold| {
            let aux_k = aux_k.then(AuxK::new);
            Kind::Selecting(Selecting { aux_k, threshold, ..Selecting::new(selection) })
        };
        let running = Some(THRESHOLD);
        let kind = match self {
            Self::TopK { k, aux_k } => selecting(Selection::TopK { k: *k }, *aux_k, None),
            Self::MultiTopK { k, aux_k } => selecting(Selection::MultiTopK { k: *k }, *aux_k, None),
            Self::AbsTopK { k, aux_k } => selecting(Selection::AbsTopK { k: *k }, *aux_k, None),
            Self::BatchTopK { k, aux_k } => {
                selecting(Selection::BatchTopK { k: *k }, *aux_k, running)
            }
            Self::Matryoshka { k, widths, aux_k } => {
                let mut widths = widths.clone();
                if widths.last() != Some(&d_sae) {
                    widths.push(d_sae);
                }
                let group = |width| Group { width, weight: 1.0 };
                let groups = widths.into_iter().map(group).collect();
                let aux_k_target = AuxKTarget::Residual;
                let selection = Selection::Matryoshka { k: *k, groups, aux_k_target };
                selecting(selection, *aux_k, running)
            }
            Self::JumpRelu { l0_coefficient, l0_target } => {
                let l0 = l0_target.map_or(L0Loss::Step, |target| L0Loss::Quadratic { target });
                Kind::JumpRelu(JumpRelu { l0, ..JumpRelu::new(*l0_coefficient) })
            }
            Self::Standard { l1_coefficient, p, to_the_p, weighted_by_decoder_norms } => {
                let norm = match to_the_p {
                    true => SparsityNorm::LpToTheP { p: *p },
                    false => SparsityNorm::Lp { p: *p },
                };
                let sparsity = Sparsity {
                    coefficient: *l1_coefficient,
                    norm,
                    weighted_by_decoder_norms: *weighted_by_decoder_norms,
                };
                Kind::Standard(Standard { sparsity })
            }
            Self::Gated { l1_coefficient, auxiliary } => Kind::Gated(Gated {
                sparsity: Sparsity::new(*l1_coefficient),
                auxiliary: *auxiliary,
            }),
            Self::MatchingPursuit { residual_threshold, max_iterations } => {
                Kind::MatchingPursuit(MatchingPursuit {
                    residual_threshold: *residual_threshold,
                    max_iterations: *max_iterations,
                    stop_on_duplicate_support: true,
                })
            }
            Self::Custom(objective) => return (**objective).clone(),
        };
        sae_core::train::Objective::new(kind)
    }
}
