//! What is trained.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::sae::{Magnitude, SaeWeights, row_squares};

/// The weights of an SAE in training, or anything of their shapes: gradients, moments.
///
/// A set of named tensors; which ones there are depends on the kind of SAE. Vectors are kept as one
/// row, `[1, m]`. Encoder and decoder are latent-major: a sparse gradient touches whole rows of
/// either, and the optimiser walks through both in the order they lie in.
#[derive(Debug, Clone, Default)]
pub struct Parameters {
    tensors: BTreeMap<ParameterName, Tensor<2>>,
}

/// Which parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ParameterName {
    /// Encoder, transposed: `[d_sae, d_in]`. A matching pursuit has none.
    WEnc,
    /// Encoder bias, `[1, d_sae]`: that of the gate where there is one.
    BEnc,
    /// Decoder, `[d_sae, d_out]`.
    WDec,
    /// Decoder bias, `[1, d_out]`.
    BDec,
    /// Threshold of a JumpReLU, `[1, d_sae]`.
    Threshold,
    /// Its logarithm, in place of it.
    LogThreshold,
    /// Logarithm of a gated SAE's scale, `[1, d_sae]`.
    RMag,
    /// Bias of a gated SAE's magnitudes, `[1, d_sae]`.
    BMag,
    /// What a transcoder adds of its input, `[d_out, d_in]`.
    WSkip,
}

impl ParameterName {
    /// All of them, in the order in which parameters are walked.
    pub const ALL: [Self; 9] = [
        Self::WEnc,
        Self::BEnc,
        Self::WDec,
        Self::BDec,
        Self::Threshold,
        Self::LogThreshold,
        Self::RMag,
        Self::BMag,
        Self::WSkip,
    ];

    /// Its name, as checkpoints spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::WEnc => "w_enc",
            Self::BEnc => "b_enc",
            Self::WDec => "w_dec",
            Self::BDec => "b_dec",
            Self::Threshold => "threshold",
            Self::LogThreshold => "log_threshold",
            Self::RMag => "r_mag",
            Self::BMag => "b_mag",
            Self::WSkip => "w_skip",
        }
    }

    /// Its shape in an SAE of this size.
    pub(super) fn shape(self, d_sae: usize, d_in: usize, d_out: usize) -> [usize; 2] {
        match self {
            Self::WEnc => [d_sae, d_in],
            Self::WDec => [d_sae, d_out],
            Self::BDec => [1, d_out],
            Self::WSkip => [d_out, d_in],
            Self::BEnc | Self::Threshold | Self::LogThreshold | Self::RMag | Self::BMag => {
                [1, d_sae]
            }
        }
    }

    /// How many of its numbers, one after the other, belong to each latent; of what all latents
    /// have in common, none do.
    pub(super) fn latent_width(self, n_columns: usize) -> Option<usize> {
        match self {
            Self::WEnc | Self::WDec => Some(n_columns),
            Self::BEnc | Self::Threshold | Self::LogThreshold | Self::RMag | Self::BMag => Some(1),
            Self::BDec | Self::WSkip => None,
        }
    }

    /// The parameter of a name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|parameter| parameter.as_str() == name)
    }
}

impl FromIterator<(ParameterName, Tensor<2>)> for Parameters {
    fn from_iter<I: IntoIterator<Item = (ParameterName, Tensor<2>)>>(tensors: I) -> Self {
        Self { tensors: tensors.into_iter().collect() }
    }
}

impl Parameters {
    /// The trained copy of an SAE's weights.
    pub fn from_weights(weights: SaeWeights) -> Self {
        let SaeWeights { w_enc, b_enc, w_dec, b_dec, threshold, magnitude, w_skip } = weights;
        // A transposed view would make every step gather columns.
        let [d_in, d_sae] = w_enc.dims();
        let w_enc = (w_enc.transpose() + 0.0).reshape([d_sae, d_in]);
        let mut parameters = Self::tied(w_dec, b_dec);
        parameters.insert(ParameterName::WEnc, w_enc);
        parameters.insert(ParameterName::BEnc, b_enc.unsqueeze());
        if let Some(threshold) = threshold {
            parameters.insert(ParameterName::Threshold, threshold.unsqueeze());
        }
        if let Some(Magnitude { r_mag, b_mag }) = magnitude {
            parameters.insert(ParameterName::RMag, r_mag.unsqueeze());
            parameters.insert(ParameterName::BMag, b_mag.unsqueeze());
        }
        if let Some(w_skip) = w_skip {
            parameters.insert(ParameterName::WSkip, w_skip);
        }
        parameters
    }

    /// A decoder and no encoder, as a matching pursuit has it.
    ///
    /// # Shapes
    /// `w_dec`: `[d_sae, d_out]`, `b_dec`: `[d_out]`.
    pub fn tied(w_dec: Tensor<2>, b_dec: Tensor<1>) -> Self {
        Self::from_iter([(ParameterName::WDec, w_dec), (ParameterName::BDec, b_dec.unsqueeze())])
    }

    /// The weights as an SAE takes them: without an encoder, the decoder stands in for it.
    ///
    /// # Panics
    /// If there is no decoder.
    pub fn to_weights(&self) -> SaeWeights {
        let (w_dec, b_dec) = (self.w_dec(), self.vector(ParameterName::BDec));
        let w_enc = self.get(ParameterName::WEnc).unwrap_or(&w_dec).clone();
        let b_enc = self.find_vector(ParameterName::BEnc);
        let b_enc = b_enc.unwrap_or_else(|| Tensor::zeros([w_dec.dims()[0]], &w_dec.device()));
        let magnitude = self.find_vector(ParameterName::RMag);
        SaeWeights {
            threshold: self.threshold(),
            magnitude: magnitude
                .map(|r_mag| Magnitude { r_mag, b_mag: self.vector(ParameterName::BMag) }),
            w_skip: self.get(ParameterName::WSkip).cloned(),
            ..SaeWeights::new(w_enc.transpose(), b_enc, w_dec, b_dec)
        }
    }

    /// The tensors with their names, always in the same order.
    pub fn named(&self) -> impl Iterator<Item = (ParameterName, &Tensor<2>)> {
        self.tensors.iter().map(|(&name, tensor)| (name, tensor))
    }

    /// A parameter, if this kind of SAE has it.
    pub fn get(&self, name: ParameterName) -> Option<&Tensor<2>> {
        self.tensors.get(&name)
    }

    /// Puts a parameter in, or in place of what was there.
    pub fn insert(&mut self, name: ParameterName, tensor: Tensor<2>) {
        self.tensors.insert(name, tensor);
    }

    /// The decoder, `[d_sae, d_out]`.
    ///
    /// # Panics
    /// If there is none.
    pub fn w_dec(&self) -> Tensor<2> {
        self.matrix(ParameterName::WDec)
    }

    /// Number of latents.
    ///
    /// # Panics
    /// If there is no decoder.
    pub fn d_sae(&self) -> usize {
        self.w_dec().dims()[0]
    }

    /// Width of what is read: that of the encoder, or of the decoder where there is none.
    ///
    /// # Panics
    /// If there is neither.
    pub fn d_in(&self) -> usize {
        let rows = self.get(ParameterName::WEnc).cloned().unwrap_or_else(|| self.w_dec());
        rows.dims()[1]
    }

    pub(super) fn matrix(&self, name: ParameterName) -> Tensor<2> {
        let tensor = self.get(name);
        tensor.unwrap_or_else(|| panic!("no {} among the parameters", name.as_str())).clone()
    }

    pub(super) fn vector(&self, name: ParameterName) -> Tensor<1> {
        self.matrix(name).squeeze_dim(0)
    }

    fn find_vector(&self, name: ParameterName) -> Option<Tensor<1>> {
        self.get(name).map(|row| row.clone().squeeze_dim(0))
    }

    /// What latents have to exceed, however it is kept.
    pub(super) fn threshold(&self) -> Option<Tensor<1>> {
        let log = || self.find_vector(ParameterName::LogThreshold).map(Tensor::exp);
        self.find_vector(ParameterName::Threshold).or_else(log)
    }

    pub(super) fn get_mut(&mut self, name: ParameterName) -> Option<&mut Tensor<2>> {
        self.tensors.get_mut(&name)
    }

    pub(super) fn take(&mut self, name: ParameterName) -> Option<Tensor<2>> {
        self.tensors.remove(&name)
    }

    /// Adds to a gradient, or begins it.
    pub(super) fn add(&mut self, name: ParameterName, gradient: Tensor<2>) {
        let gradient = match self.take(name) {
            Some(sum) => sum + gradient,
            None => gradient,
        };
        self.insert(name, gradient);
    }

    /// Changes on the host what belongs to some latents: their rows of encoder and decoder, their
    /// entries of vectors.
    pub(super) fn map_latents(
        &mut self,
        latents: &[u32],
        change: impl Fn(u32, ParameterName, &mut [f32]),
    ) {
        for (&name, tensor) in &mut self.tensors {
            let [n_rows, n_columns] = tensor.dims();
            let Some(width) = name.latent_width(n_columns) else { continue };
            let data = tensor.to_data();
            let mut values: Vec<f32> = data.try_into_vec_as().expect("floats convert to f32");
            for &latent in latents {
                change(latent, name, &mut values[latent as usize * width..][..width]);
            }
            let data = TensorData::new(values, [n_rows, n_columns]);
            *tensor = Tensor::from_data(data, &tensor.device());
        }
    }

    /// Zeros of the same shapes.
    pub fn zeros_like(&self) -> Self {
        self.named().map(|(name, tensor)| (name, tensor.zeros_like())).collect()
    }

    /// The same on another device.
    pub fn to_device(self, device: &Device) -> Self {
        self.tensors.into_iter().map(|(name, tensor)| (name, tensor.to_device(device))).collect()
    }

    /// `√Σ p²` over all of them.
    pub fn norm(&self) -> f64 {
        let square = |tensor: &Tensor<2>| row_squares(tensor).sum().into_scalar::<f32>();
        self.tensors.values().map(|tensor| f64::from(square(tensor))).sum::<f64>().sqrt()
    }

    /// Whether none of them holds a NaN or an infinity.
    pub fn are_finite(&self) -> bool {
        // Either one makes the sum what it is itself, or NaN.
        self.tensors.values().all(|tensor| tensor.clone().sum().into_scalar::<f32>().is_finite())
    }

    /// All of them times `factor`.
    pub fn scaled(self, factor: f64) -> Self {
        self.tensors.into_iter().map(|(name, tensor)| (name, tensor.mul_scalar(factor))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        let n = shape.iter().product::<usize>() as i64;
        Tensor::<1, burn::tensor::Int>::arange(0..n, &Device::flex()).float().reshape(shape)
    }

    fn weights() -> SaeWeights {
        SaeWeights {
            threshold: Some(counted([7])),
            magnitude: Some(Magnitude { r_mag: counted([7]), b_mag: counted([7]) + 1.0 }),
            w_skip: Some(counted([5, 4])),
            ..SaeWeights::new(counted([4, 7]), counted([7]), counted([7, 5]), counted([5]))
        }
    }

    fn data(parameters: &Parameters) -> Vec<(ParameterName, TensorData)> {
        parameters.named().map(|(name, tensor)| (name, tensor.to_data())).collect()
    }

    #[test]
    fn weights_go_there_and_back() {
        let parameters = Parameters::from_weights(weights());
        assert_eq!((parameters.d_sae(), parameters.d_in()), (7, 4));
        let back = parameters.to_weights();
        back.w_enc.to_data().assert_eq(&weights().w_enc.to_data(), true);
        assert_eq!(data(&Parameters::from_weights(back)), data(&parameters));
        let again = Parameters::from_iter(parameters.named().map(|(name, t)| (name, t.clone())));
        assert_eq!(data(&again), data(&parameters));
    }

    #[test]
    fn a_threshold_may_be_kept_as_its_logarithm() {
        let mut parameters = Parameters::tied(counted([2, 3]), counted([3]));
        parameters.insert(ParameterName::LogThreshold, counted([1, 2]));
        let threshold = parameters.to_weights().threshold.expect("there");
        let expected = TensorData::from([1.0f32, std::f32::consts::E]);
        threshold
            .into_data()
            .assert_approx_eq(&expected, burn::tensor::Tolerance::<f32>::default());
    }

    #[test]
    fn names_parse() {
        for name in ParameterName::ALL {
            assert_eq!(ParameterName::parse(name.as_str()), Some(name));
        }
        assert_eq!(ParameterName::parse("W_enc"), None);
    }

    #[test]
    fn norm_and_finiteness_are_over_everything() {
        let mut parameters = Parameters::tied(counted([1, 4]), counted([4]));
        assert_eq!(parameters.norm(), 28f64.sqrt());
        assert_eq!(parameters.clone().scaled(2.0).norm(), 112f64.sqrt());
        assert!(parameters.are_finite());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            parameters
                .insert(ParameterName::RMag, Tensor::from_data([[1.0, bad]], &Device::flex()));
            assert!(!parameters.are_finite());
        }
    }
}
