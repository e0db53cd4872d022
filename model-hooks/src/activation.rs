//! An activation whose rank is known at run time.

use burn::tensor::Tensor;

/// An activation as run-time lists of edits and caches hold it: with its rank named.
#[derive(Debug, Clone)]
pub enum Activation {
    /// `[batch, pos, width]`.
    Rank3(Tensor<3>),
    /// `[batch, pos, head, d_head]` or `[batch, head, query, key]`.
    Rank4(Tensor<4>),
}

impl Activation {
    /// From a tensor of rank 3 or 4, the only ones that hook points have.
    ///
    /// # Panics
    /// On any other rank.
    pub fn new<const D: usize>(x: Tensor<D>) -> Self {
        match D {
            3 => Self::Rank3(same_rank(x)),
            4 => Self::Rank4(same_rank(x)),
            _ => panic!("activations have rank 3 or 4, not {D}"),
        }
    }

    /// Back to a tensor.
    ///
    /// # Panics
    /// If it has another rank.
    pub fn into_tensor<const D: usize>(self) -> Tensor<D> {
        match self {
            Self::Rank3(x) => same_rank(x),
            Self::Rank4(x) => same_rank(x),
        }
    }

    /// The lengths of its axes.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Rank3(x) => x.dims().to_vec(),
            Self::Rank4(x) => x.dims().to_vec(),
        }
    }
}

/// `A` and `B` are equal, which the type system cannot see.
fn same_rank<const A: usize, const B: usize>(x: Tensor<A>) -> Tensor<B> {
    assert_eq!(A, B, "an activation of rank {A} was taken for one of rank {B}");
    Tensor::from_dispatch(x.into_dispatch())
}
