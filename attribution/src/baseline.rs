//! What things are changed to.

/// What an activation, or the latents and the error of an SAE, are changed to when their effect is
/// asked for.
#[derive(Debug)]
pub enum Baseline<'a, M> {
    /// Nothing: zero-ablation.
    Zero,
    /// A mean over some text.
    Mean(&'a M),
    /// What they are in another run at the same place: conversations with as many tokens each.
    Run(&'a [Vec<u32>]),
}

// Derived, these would ask the same of the mean, which is only referred to.
impl<M> Clone for Baseline<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Baseline<'_, M> {}
