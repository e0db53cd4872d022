//! `rope_theta`, `rope_scaling` and `rope_parameters`.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::{ConfigError, LongRope, RopeConfig, RopeScaling, RotaryPairs, require};
use super::{present, unsupported};

/// The fields about rotary embedding that a config has, of either spelling.
#[derive(Deserialize)]
pub(super) struct HfRope {
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_scaling: Option<Map<String, Value>>,
    pub(super) rope_parameters: Option<Map<String, Value>>,
    pub(super) partial_rotary_factor: Option<f64>,
    /// Beside `rope_scaling` in Phi-3's files, inside it in others.
    pub(super) original_max_position_embeddings: Option<usize>,
}

/// What one of these maps says.
struct Parameters {
    theta: Option<f64>,
    partial: Option<f64>,
    scaling: RopeScaling,
}

impl HfRope {
    /// The rotary of a model whose heads are `d_head` wide, with its defaults where nothing is
    /// said.
    pub(super) fn config(
        &self,
        d_head: usize,
        n_ctx: usize,
        default_theta: f64,
    ) -> Result<RopeConfig, ConfigError> {
        let read = |map: &Option<Map<String, Value>>| {
            map.as_ref().map(|map| self.parameters(map, n_ctx)).transpose()
        };
        let (new, old) = (read(&self.rope_parameters)?, read(&self.rope_scaling)?);
        if let (Some(new), Some(old)) = (&new, &old) {
            let same = new.scaling == old.scaling;
            require(same, "rope_parameters", "the same as rope_scaling", "another")?;
        }
        let said = new.or(old);
        let (theta, partial) = said.as_ref().map_or((None, None), |p| (p.theta, p.partial));
        if let (Some(inner), Some(outer)) = (theta, self.rope_theta) {
            require(inner == outer, "rope_theta", "the same in rope_parameters", outer)?;
        }
        if let (Some(inner), Some(outer)) = (partial, self.partial_rotary_factor) {
            let field = "partial_rotary_factor";
            require(inner == outer, field, "the same in rope_parameters", outer)?;
        }
        let partial = partial.or(self.partial_rotary_factor).unwrap_or(1.0);
        let is_share = partial > 0.0 && partial <= 1.0;
        require(is_share, "partial_rotary_factor", "above 0 and at most 1", partial)?;
        Ok(RopeConfig {
            theta: theta.or(self.rope_theta).unwrap_or(default_theta),
            n_dims: (d_head as f64 * partial) as usize,
            pairs: RotaryPairs::Halves,
            scaling: said.map_or(RopeScaling::Default, |said| said.scaling),
        })
    }

    fn parameters(
        &self,
        map: &Map<String, Value>,
        n_ctx: usize,
    ) -> Result<Parameters, ConfigError> {
        let mut map = map.clone();
        let new: Option<String> = take(&mut map, "rope_type")?;
        // The older name of `rope_type`; some files carry both.
        let old: Option<String> = take(&mut map, "type")?;
        if let (Some(new), Some(old)) = (&new, &old) {
            require(new == old, "rope_type", "the same as its older name `type`", new)?;
        }
        let theta = take(&mut map, "rope_theta")?;
        let partial = take(&mut map, "partial_rotary_factor")?;
        let rope_type = new.or(old).unwrap_or_else(|| "default".into());
        let scaling = self.scaling(&rope_type, map, n_ctx)?;
        Ok(Parameters { theta, partial, scaling })
    }

    fn scaling(
        &self,
        rope_type: &str,
        map: Map<String, Value>,
        n_ctx: usize,
    ) -> Result<RopeScaling, ConfigError> {
        match rope_type {
            "default" => match map.iter().find(|(_, value)| !value.is_null()) {
                Some((field, value)) => Err(unsupported(field, value)),
                None => Ok(RopeScaling::Default),
            },
            "linear" => {
                let HfLinear { factor } = rest(map)?;
                Ok(RopeScaling::Linear { factor: present(factor, "factor")? })
            }
            "llama3" => {
                let hf: HfLlama3 = rest(map)?;
                Ok(RopeScaling::Llama3 {
                    factor: present(hf.factor, "factor")?,
                    low_freq_factor: present(hf.low_freq_factor, "low_freq_factor")?,
                    high_freq_factor: present(hf.high_freq_factor, "high_freq_factor")?,
                    original_n_ctx: self.original(hf.original_max_position_embeddings)?,
                })
            }
            "yarn" => {
                let hf: HfYarn = rest(map)?;
                let factor = present(hf.factor, "factor")?;
                let original = hf.original_max_position_embeddings;
                Ok(RopeScaling::Yarn {
                    factor,
                    beta_fast: hf.beta_fast.unwrap_or(32.0),
                    beta_slow: hf.beta_slow.unwrap_or(1.0),
                    truncate: hf.truncate.unwrap_or(true),
                    original_n_ctx: original
                        .or(self.original_max_position_embeddings)
                        .unwrap_or(n_ctx),
                    attention_factor: hf.attention_factor.unwrap_or_else(|| {
                        match (hf.mscale, hf.mscale_all_dim) {
                            (Some(one), Some(all)) => {
                                yarn_attention(factor, one) / yarn_attention(factor, all)
                            }
                            _ => yarn_attention(factor, 1.0),
                        }
                    }),
                })
            }
            "longrope" | "su" => {
                let hf: HfLongRope = rest(map)?;
                let original_n_ctx = self.original(hf.original_max_position_embeddings)?;
                let factor = hf.factor.unwrap_or(n_ctx as f64 / original_n_ctx as f64);
                let attention_factor = hf.attention_factor.unwrap_or(match factor <= 1.0 {
                    true => 1.0,
                    false => (1.0 + factor.ln() / (original_n_ctx as f64).ln()).sqrt(),
                });
                Ok(RopeScaling::LongRope(LongRope {
                    short_factors: present(hf.short_factor, "short_factor")?,
                    long_factors: present(hf.long_factor, "long_factor")?,
                    original_n_ctx,
                    attention_factor,
                }))
            }
            other => Err(ConfigError::UnknownRope { actual: other.to_owned() }),
        }
    }

    fn original(&self, inner: Option<usize>) -> Result<usize, ConfigError> {
        let field = "original_max_position_embeddings";
        let outer = self.original_max_position_embeddings;
        if let (Some(inner), Some(outer)) = (inner, outer) {
            require(inner == outer, field, "the same inside and beside rope_scaling", inner)?;
        }
        present(inner.or(outer), field)
    }
}

/// `0.1 · mscale · ln(factor) + 1` (Peng et al., 2023).
fn yarn_attention(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

fn take<T: serde::de::DeserializeOwned>(
    map: &mut Map<String, Value>,
    field: &str,
) -> Result<Option<T>, ConfigError> {
    let value = map.remove(field).unwrap_or(Value::Null);
    serde_json::from_value(value).map_err(|source| ConfigError::Json { source })
}

/// What is left of the map, all of which belongs to the type of scaling: another field would
/// change what it computes.
fn rest<T: serde::de::DeserializeOwned>(map: Map<String, Value>) -> Result<T, ConfigError> {
    serde_json::from_value(Value::Object(map)).map_err(|source| ConfigError::Json { source })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HfLinear {
    factor: Option<f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HfLlama3 {
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HfYarn {
    factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    truncate: Option<bool>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    attention_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HfLongRope {
    factor: Option<f64>,
    short_factor: Option<Vec<f64>>,
    long_factor: Option<Vec<f64>>,
    attention_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}
