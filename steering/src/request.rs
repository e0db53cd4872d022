//! Whether a request is one to steer the answer to, told before it is answered.

use std::ops::ControlFlow;

use burn::tensor::{Tensor, TensorData};
use model_hooks::{ForwardError, HarvestConfig, Harvested, HookPoint, LanguageModel, SharedPrefix};
use serde::{Deserialize, Serialize};

use crate::logistic::LogisticProbe;
use crate::plan::{PlanError, PlanModel};

/// A request in tokens, behind what was said before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Up to where the answer begins.
    pub ids: Vec<u32>,
    /// The position at which the words of the request begin.
    pub start: usize,
}

/// A linear probe of what a model makes of a request, as a JSON document of this version.
///
/// A [`Condition`](crate::Condition) decides in the pass that it steers, from activations before
/// those that are steered. This one has a pass of its own before: it may read several blocks, behind
/// the steered ones too, and what it leaves alone is answered by the very model that was there
/// before. A caller steers the answers to requests for which it [`fires`](Self::fires).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestProbe {
    /// The version of the format: [`RequestProbe::VERSION`].
    pub request_probe: u32,
    /// The model that it was made for.
    pub model: PlanModel,
    /// What is read of a request.
    pub reading: RequestReading,
    /// The probe of all features, one behind another.
    pub probe: LogisticProbe,
    /// What the logit has to exceed.
    pub threshold: f64,
}

/// What is read of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestReading {
    /// Activations of the residual stream.
    pub features: Vec<RequestFeature>,
    /// Tokens behind the last word of a request.
    pub n_behind: usize,
}

/// An activation of the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestFeature {
    /// The block behind which it is read.
    pub layer: usize,
    /// Of which tokens.
    pub at: At,
}

/// Tokens of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum At {
    /// The one so many before the last.
    FromEnd(usize),
    /// The mean over its words.
    Mean,
}

impl RequestReading {
    /// The features of each request, one behind another: `[n_features · d_model]`. A beginning that
    /// all of them share is run once. `progress` is told how many more are done.
    ///
    /// # Errors
    /// If a request does not fit the model, or a block is not there.
    pub fn read(
        &self,
        model: &LanguageModel,
        requests: &[Request],
        batch_tokens: usize,
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<Vec<f32>>, ForwardError> {
        let d_model = model.config().d_model;
        let mut read = vec![vec![0f32; self.features.len() * d_model]; requests.len()];
        let mut layers: Vec<usize> = self.features.iter().map(|feature| feature.layer).collect();
        layers.sort_unstable();
        layers.dedup();
        let Some(&first) = layers.first() else { return Ok(read) };
        let n_shared = n_shared(requests);
        let prefix = match n_shared {
            0 => SharedPrefix::default(),
            n => model.prefix(&requests[0].ids[..n], &mut ())?,
        };
        let mut config = HarvestConfig::new(HookPoint::resid_post(first), batch_tokens);
        config.points = layers.iter().map(|&layer| HookPoint::resid_post(layer)).collect();
        let own: Vec<&[u32]> = requests.iter().map(|request| &request.ids[n_shared..]).collect();
        let sink = |harvested: Harvested| {
            let Harvested { activations, places } = harvested;
            let activations: Vec<TensorData> =
                activations.into_iter().map(Tensor::into_data).collect();
            for (index, feature) in self.features.iter().enumerate() {
                let point = layers.binary_search(&feature.layer).expect("one of the layers");
                let rows = activations[point].as_slice::<f32>().expect("f32 activations");
                for (row, place) in rows.chunks_exact(d_model).zip(&places) {
                    let weight = self.weight(*feature, &requests[place.text], place.position);
                    if weight > 0.0 {
                        let out = &mut read[place.text][index * d_model..][..d_model];
                        out.iter_mut().zip(row).for_each(|(out, x)| *out += weight * x);
                    }
                }
            }
            let is_last = |position, text: usize| position + 1 == requests[text].ids.len();
            progress(places.iter().filter(|at| is_last(at.position, at.text)).count());
            ControlFlow::Continue(())
        };
        model.harvest(&own, &prefix, &config, sink)?;
        Ok(read)
    }

    /// What a token counts for in a feature of a request.
    fn weight(&self, feature: RequestFeature, request: &Request, position: usize) -> f32 {
        let length = request.ids.len();
        match feature.at {
            At::FromEnd(n) => f32::from(u8::from(length - 1 - position == n)),
            At::Mean => {
                let end = length.saturating_sub(self.n_behind);
                let words = request.start.min(end)..end;
                if words.contains(&position) { 1.0 / words.len() as f32 } else { 0.0 }
            }
        }
    }
}

/// How many tokens all of them begin with, before any of their words.
fn n_shared(requests: &[Request]) -> usize {
    let [first, rest @ ..] = requests else { return 0 };
    if rest.is_empty() {
        return 0;
    }
    let agreeing =
        |other: &Request| first.ids.iter().zip(&other.ids).take_while(|(a, b)| a == b).count();
    let shared = rest.iter().map(agreeing).min().unwrap_or(0);
    // Of each request there is something left to run.
    requests.iter().map(|it| it.start.min(it.ids.len().saturating_sub(1))).fold(shared, usize::min)
}

impl RequestProbe {
    /// The version that is read and written.
    pub const VERSION: u32 = 1;
    /// Tokens of a forward pass.
    const BATCH_TOKENS: usize = 1024;

    /// Reads a document.
    ///
    /// # Errors
    /// If it is no probe of this version, has an unknown key, a number that is not finite, or
    /// weights that do not fit its features.
    pub fn from_json(json: &str) -> Result<Self, PlanError> {
        #[derive(Deserialize)]
        struct Version {
            request_probe: u32,
        }
        // The version comes first: another one may well have other keys.
        let version: Version = serde_json::from_str(json).map_err(PlanError::Json)?;
        let (expected, actual) = (Self::VERSION, version.request_probe);
        if actual != expected {
            return Err(PlanError::Version { expected, actual });
        }
        let probe: Self = serde_json::from_str(json).map_err(PlanError::Json)?;
        probe.validate()?;
        Ok(probe)
    }

    /// The document, which [`from_json`](Self::from_json) reads back to the same probe.
    ///
    /// # Errors
    /// As there: what could not be read is not written.
    pub fn to_json(&self) -> Result<String, PlanError> {
        self.validate()?;
        serde_json::to_string_pretty(self).map_err(PlanError::Json)
    }

    /// That it was made for this model, of whose file the caller may know the hash.
    ///
    /// # Errors
    /// If not, or it reads a block that is not there.
    pub fn check(
        &self,
        model: &LanguageModel,
        model_sha256: Option<&str>,
    ) -> Result<(), PlanError> {
        self.validate()?;
        self.model.check(model, model_sha256)?;
        for feature in &self.reading.features {
            let point = HookPoint::resid_post(feature.layer);
            model.check_point(point).map_err(|source| PlanError::Probe { source })?;
        }
        Ok(())
    }

    /// Whether each of some requests is one to steer the answer to. No request sees another.
    ///
    /// # Errors
    /// If a request does not fit the model, or a block is not there.
    ///
    /// # Panics
    /// If the model has another width: [`check`](Self::check) tells.
    pub fn fires(
        &self,
        model: &LanguageModel,
        requests: &[Request],
    ) -> Result<Vec<bool>, ForwardError> {
        let width = self.reading.features.len() * model.config().d_model;
        assert_eq!(self.probe.weights.len(), width, "a probe for a model of another width");
        let read = self.reading.read(model, requests, Self::BATCH_TOKENS, |_| ())?;
        Ok(read.iter().map(|x| self.probe.logit(x) > self.threshold).collect())
    }

    fn validate(&self) -> Result<(), PlanError> {
        let weights = &self.probe.weights;
        // A document may say anything.
        let expected = self.reading.features.len().saturating_mul(self.model.d_model);
        let actual = weights.len();
        if actual == 0 || actual != expected {
            return Err(PlanError::ProbeWidth { expected, actual });
        }
        let numbers = weights.iter().copied().chain([self.probe.bias, self.threshold as f32]);
        for value in numbers {
            if !value.is_finite() {
                return Err(PlanError::NotFinite { place: "a number of the probe".into(), value });
            }
        }
        Ok(())
    }
}
