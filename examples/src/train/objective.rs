//! Kinds of SAEs as a user names them.

use sae_core::train::{
    AuxK, AuxKTarget, Gated, GatedAuxiliary, Group, JumpRelu, Kind, L0Loss, RunningThreshold,
    Selecting, Selection, Sparsity, Standard,
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
    },
    /// Gates, with a penalty, and magnitudes.
    Gated {
        /// The penalty's weight.
        l1_coefficient: f64,
    },
    /// As the library has it, in full.
    Custom(Box<sae_core::train::Objective>),
}

fn yes() -> bool {
    true
}

impl Objective {
    /// What the kind is called.
    pub fn label(&self) -> String {
        match self {
            Self::TopK { k, .. } => format!("TopK {k}"),
            Self::BatchTopK { k, .. } => format!("BatchTopK {k}"),
            Self::Matryoshka { k, .. } => format!("Matryoshka {k}"),
            Self::JumpRelu { l0_target: Some(target), .. } => format!("JumpReLU, L0 → {target}"),
            Self::JumpRelu { l0_coefficient, .. } => format!("JumpReLU {l0_coefficient}"),
            Self::Standard { l1_coefficient } => format!("L1 {l1_coefficient}"),
            Self::Gated { l1_coefficient } => format!("Gated {l1_coefficient}"),
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
            Self::Standard { l1_coefficient } => {
                Kind::Standard(Standard { sparsity: Sparsity::new(*l1_coefficient) })
            }
            Self::Gated { l1_coefficient } => Kind::Gated(Gated {
                sparsity: Sparsity::new(*l1_coefficient),
                auxiliary: GatedAuxiliary::DetachedDecoder,
            }),
            Self::Custom(objective) => return (**objective).clone(),
        };
        sae_core::train::Objective::new(kind)
    }
}
