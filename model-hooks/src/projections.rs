//! The weights of blocks' linear layers, by name: to train them, or to put others in their place.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::layers::{Block, Linear};
use crate::model::{ForwardError, LanguageModel};

/// A linear layer of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// What heads write.
    Output,
    /// The gate of a gated MLP.
    Gate,
    /// Into the MLP.
    Up,
    /// Out of the MLP.
    Down,
}

/// Which weight one is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightOf {
    /// The block.
    pub layer: usize,
    /// The linear layer in it.
    pub projection: Projection,
    /// The checkpoint's tensor that is this weight, transposed; none where the file keeps it as it is,
    /// or as one with others.
    pub tensor: Option<String>,
}

impl LanguageModel {
    /// The same model with what `change` makes of the weights of some blocks' linear layers, block by
    /// block in the order of [`Projection`]. Biases and norms stay, and all else is shared.
    ///
    /// # Shapes
    /// Weights: `[d_in, d_out]`, in and out.
    ///
    /// # Errors
    /// If the model does not have these blocks.
    ///
    /// # Panics
    /// If a weight comes back in another shape.
    pub fn map_weights(
        &self,
        layers: Range<usize>,
        mut change: impl FnMut(&WeightOf, Tensor<2>) -> Tensor<2>,
    ) -> Result<Self, ForwardError> {
        let mut changed = self.clone();
        let blocks = changed.blocks_mut();
        if layers.end > blocks.len() {
            return Err(ForwardError::NoSuchLayer {
                expected: blocks.len(),
                actual: layers.end - 1,
            });
        }
        for layer in layers {
            for (projection, linear) in linears(&mut blocks[layer]) {
                let of = WeightOf { layer, projection, tensor: linear.tensor.clone() };
                let before = linear.weight.dims();
                linear.weight = change(&of, linear.weight.clone());
                let after = linear.weight.dims();
                assert_eq!(after, before, "the weight of {of:?} has another shape");
            }
        }
        Ok(changed)
    }
}

/// The linear layers of a block, in the order of [`Projection`].
fn linears(block: &mut Block) -> impl Iterator<Item = (Projection, &mut Linear)> {
    let Block { attention, mlp, .. } = block;
    let of_attention = [
        (Projection::Query, &mut attention.query),
        (Projection::Key, &mut attention.key),
        (Projection::Value, &mut attention.value),
        (Projection::Output, &mut attention.output),
    ];
    let gate = mlp.gate.as_mut().map(|gate| (Projection::Gate, gate));
    let rest = [(Projection::Up, &mut mlp.up), (Projection::Down, &mut mlp.down)];
    of_attention.into_iter().chain(gate).chain(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load;
    use crate::tokens::TokenBatch;
    use burn::tensor::{Device, Distribution};

    fn model(name: &str) -> LanguageModel {
        let mut checkpoint = load::open(&goldens::own("models").join(name)).unwrap();
        let device = Device::flex();
        LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &device).unwrap()
    }

    /// A number that hangs on all weights.
    fn metric(model: &LanguageModel) -> Tensor<1> {
        let rows: [&[u32]; 2] = [&[5, 9, 40, 77], &[44, 3]];
        let tokens = TokenBatch::new(&rows, model.config(), model.device()).unwrap();
        let logits = model.last_logits(&tokens, &mut ()).unwrap();
        (logits.clone().narrow(1, 3, 1) - logits.narrow(1, 8, 1)).sum()
    }

    fn number(x: Tensor<1>) -> f64 {
        f64::from(x.into_scalar::<f32>())
    }

    #[test]
    fn weights_have_the_names_of_their_tensors() {
        let named = |name: &str| {
            let mut named = Vec::new();
            let model = model(name);
            let same = model.map_weights(0..model.config().n_layers, |of, weight| {
                named.push((of.projection, of.tensor.clone()));
                weight
            });
            assert_eq!(number(metric(&same.unwrap())), number(metric(&model)), "{name}");
            named.truncate(named.len() / model.config().n_layers);
            named
        };
        let llama = named("llama_mha");
        assert_eq!(llama.len(), 7);
        let name = Some("model.layers.0.self_attn.q_proj.weight".to_owned());
        assert_eq!(llama[0], (Projection::Query, name));
        let name = Some("model.layers.0.mlp.down_proj.weight".to_owned());
        assert_eq!(llama[6], (Projection::Down, name));
        assert_eq!(named("gptj").len(), 6, "no gate");
        assert!(named("gpt2").iter().all(|(_, tensor)| tensor.is_none()), "as [d_in, d_out]");
    }

    #[test]
    fn a_block_that_is_not_there_is_an_error() {
        let error = model("llama_mha").map_weights(1..9, |_, weight| weight).unwrap_err();
        assert!(matches!(error, ForwardError::NoSuchLayer { actual: 8, .. }), "{error}");
    }

    #[test]
    fn gradients_of_weights_are_finite_differences() {
        for name in ["llama_mha", "gptj", "gpt2"] {
            let model = model(name);
            let last = model.config().n_layers - 1;
            let mut leaves = Vec::new();
            let trained = model.map_weights(last - 1..last + 1, |of, weight| {
                let leaf = weight.autodiff().require_grad();
                leaves.push((of.clone(), leaf.clone()));
                leaf
            });
            let grads = metric(&trained.unwrap()).backward();
            for (of, leaf) in leaves {
                let gradient = leaf.grad(&grads).unwrap_or_else(|| panic!("{name}: {of:?}"));
                let (shape, device) = (gradient.dims(), gradient.device());
                let way = Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
                let moved = |by: f64| {
                    let model = model.map_weights(of.layer..of.layer + 1, |at, weight| {
                        if *at == of { weight + way.clone() * by } else { weight }
                    });
                    number(metric(&model.unwrap()))
                };
                let step = 1e-2;
                let measured = (moved(step) - moved(-step)) / (2.0 * step);
                let expected = number((gradient.clone() * way.clone()).sum());
                let size = number(gradient.powi_scalar(2).sum()).sqrt();
                assert!(
                    (measured - expected).abs() < 0.02 * size + 1e-3,
                    "{name}, {of:?}: {measured}, not {expected}"
                );
            }
        }
    }
}
