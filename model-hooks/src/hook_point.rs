//! Every place in a transformer that a hook can look at.

use std::fmt;
use std::str::FromStr;

/// A named place in a forward pass. Names are TransformerLens' (`blocks.12.hook_resid_post`);
/// [`FromStr`] and [`Display`](fmt::Display) convert strictly, both ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HookPoint {
    /// `hook_embed`: token embeddings.
    Embed,
    /// `hook_pos_embed`: position embeddings, where they are learned.
    PosEmbed,
    /// `blocks.{layer}.…`: a place inside a block.
    Block {
        /// Index of the block, from 0.
        layer: usize,
        /// The place in it.
        site: Site,
    },
    /// `ln_final.hook_scale`: the divisor of the final norm.
    LnFinalScale,
    /// `ln_final.hook_normalized`: the final norm before its gain.
    LnFinalNormalized,
}

/// A place inside a block, in execution order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// `hook_resid_pre`: the residual stream as the block finds it.
    ResidPre,
    /// `ln1.hook_scale`: the divisor of the norm before attention.
    Ln1Scale,
    /// `ln1.hook_normalized`: that norm before its gain.
    Ln1Normalized,
    /// `attn.hook_q`: queries before the rotary, behind their norm where they have one.
    Q,
    /// `attn.hook_k`: keys before the rotary, behind their norm where they have one.
    K,
    /// `attn.hook_v`: values.
    V,
    /// `attn.hook_rot_q`: queries after the rotary.
    RotQ,
    /// `attn.hook_rot_k`: keys after the rotary.
    RotK,
    /// `attn.hook_attn_scores`: scaled, soft-capped and masked, just before the softmax.
    AttnScores,
    /// `attn.hook_pattern`: after the softmax.
    Pattern,
    /// `attn.hook_z`: the heads' weighted values.
    Z,
    /// `ln1_post.hook_scale`: the divisor of a norm behind attention.
    Ln1PostScale,
    /// `ln1_post.hook_normalized`: that norm before its gain.
    Ln1PostNormalized,
    /// `hook_attn_out`: what attention adds to the residual.
    AttnOut,
    /// `hook_resid_mid`: the residual between attention and MLP, where one follows the other.
    ResidMid,
    /// `ln2.hook_scale`: the divisor of the norm before the MLP.
    Ln2Scale,
    /// `ln2.hook_normalized`: that norm before its gain.
    Ln2Normalized,
    /// `mlp.hook_pre`: the gate (or only) pre-activation.
    MlpPre,
    /// `mlp.hook_pre_linear`: the linear branch of a gated MLP.
    MlpPreLinear,
    /// `mlp.hook_post`: the MLP's hidden activation.
    MlpPost,
    /// `ln2_post.hook_scale`: the divisor of a norm behind the MLP.
    Ln2PostScale,
    /// `ln2_post.hook_normalized`: that norm before its gain.
    Ln2PostNormalized,
    /// `hook_mlp_out`: what the MLP adds to the residual.
    MlpOut,
    /// `hook_resid_post`: the residual as the block leaves it.
    ResidPost,
}

/// What a dimension of an activation counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Rows of the batch.
    Batch,
    /// Token positions.
    Pos,
    /// Query heads.
    Head,
    /// Key and value heads.
    KvHead,
    /// Query positions.
    Query,
    /// Key positions, the cached ones included.
    Key,
    /// The residual width.
    DModel,
    /// The hidden width of the MLP.
    DMlp,
    /// The width of a head.
    DHead,
    /// A single number.
    One,
}

impl HookPoint {
    /// `blocks.{layer}.hook_resid_pre`.
    pub fn resid_pre(layer: usize) -> Self {
        Self::Block { layer, site: Site::ResidPre }
    }

    /// `blocks.{layer}.hook_resid_post`.
    pub fn resid_post(layer: usize) -> Self {
        Self::Block { layer, site: Site::ResidPost }
    }

    /// The block this point stands in, if it stands in one.
    pub fn layer(self) -> Option<usize> {
        match self {
            Self::Block { layer, .. } => Some(layer),
            Self::Embed | Self::PosEmbed | Self::LnFinalScale | Self::LnFinalNormalized => None,
        }
    }

    /// What the dimensions of the activation mean, outermost first.
    pub fn axes(self) -> &'static [Axis] {
        use Axis::*;
        match self {
            Self::Embed | Self::PosEmbed | Self::LnFinalNormalized => &[Batch, Pos, DModel],
            Self::LnFinalScale => &[Batch, Pos, One],
            Self::Block { site, .. } => site.axes(),
        }
    }
}

impl Site {
    /// All sites in execution order.
    pub const ALL: [Self; 24] = [
        Self::ResidPre,
        Self::Ln1Scale,
        Self::Ln1Normalized,
        Self::Q,
        Self::K,
        Self::V,
        Self::RotQ,
        Self::RotK,
        Self::AttnScores,
        Self::Pattern,
        Self::Z,
        Self::Ln1PostScale,
        Self::Ln1PostNormalized,
        Self::AttnOut,
        Self::ResidMid,
        Self::Ln2Scale,
        Self::Ln2Normalized,
        Self::MlpPre,
        Self::MlpPreLinear,
        Self::MlpPost,
        Self::Ln2PostScale,
        Self::Ln2PostNormalized,
        Self::MlpOut,
        Self::ResidPost,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::ResidPre => "hook_resid_pre",
            Self::Ln1Scale => "ln1.hook_scale",
            Self::Ln1Normalized => "ln1.hook_normalized",
            Self::Q => "attn.hook_q",
            Self::K => "attn.hook_k",
            Self::V => "attn.hook_v",
            Self::RotQ => "attn.hook_rot_q",
            Self::RotK => "attn.hook_rot_k",
            Self::AttnScores => "attn.hook_attn_scores",
            Self::Pattern => "attn.hook_pattern",
            Self::Z => "attn.hook_z",
            Self::Ln1PostScale => "ln1_post.hook_scale",
            Self::Ln1PostNormalized => "ln1_post.hook_normalized",
            Self::AttnOut => "hook_attn_out",
            Self::ResidMid => "hook_resid_mid",
            Self::Ln2Scale => "ln2.hook_scale",
            Self::Ln2Normalized => "ln2.hook_normalized",
            Self::MlpPre => "mlp.hook_pre",
            Self::MlpPreLinear => "mlp.hook_pre_linear",
            Self::MlpPost => "mlp.hook_post",
            Self::Ln2PostScale => "ln2_post.hook_scale",
            Self::Ln2PostNormalized => "ln2_post.hook_normalized",
            Self::MlpOut => "hook_mlp_out",
            Self::ResidPost => "hook_resid_post",
        }
    }

    fn axes(self) -> &'static [Axis] {
        use Axis::*;
        match self {
            Self::ResidPre
            | Self::Ln1Normalized
            | Self::Ln1PostNormalized
            | Self::AttnOut
            | Self::ResidMid
            | Self::Ln2Normalized
            | Self::Ln2PostNormalized
            | Self::MlpOut
            | Self::ResidPost => &[Batch, Pos, DModel],
            Self::Ln1Scale | Self::Ln1PostScale | Self::Ln2Scale | Self::Ln2PostScale => {
                &[Batch, Pos, One]
            }
            Self::Q | Self::RotQ | Self::Z => &[Batch, Pos, Head, DHead],
            Self::K | Self::V | Self::RotK => &[Batch, Pos, KvHead, DHead],
            Self::AttnScores | Self::Pattern => &[Batch, Head, Query, Key],
            Self::MlpPre | Self::MlpPreLinear | Self::MlpPost => &[Batch, Pos, DMlp],
        }
    }
}

impl fmt::Display for HookPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embed => write!(f, "hook_embed"),
            Self::PosEmbed => write!(f, "hook_pos_embed"),
            Self::Block { layer, site } => write!(f, "blocks.{layer}.{}", site.name()),
            Self::LnFinalScale => write!(f, "ln_final.hook_scale"),
            Self::LnFinalNormalized => write!(f, "ln_final.hook_normalized"),
        }
    }
}

/// A name that is no hook point's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown hook point {name:?}: expected a name such as hook_embed, blocks.12.hook_resid_post \
     or ln_final.hook_normalized"
)]
pub struct UnknownHookPoint {
    /// The name as given.
    pub name: String,
}

impl FromStr for HookPoint {
    type Err = UnknownHookPoint;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let unknown = || UnknownHookPoint { name: name.to_owned() };
        match name {
            "hook_embed" => return Ok(Self::Embed),
            "hook_pos_embed" => return Ok(Self::PosEmbed),
            "ln_final.hook_scale" => return Ok(Self::LnFinalScale),
            "ln_final.hook_normalized" => return Ok(Self::LnFinalNormalized),
            _ => {}
        }
        let rest = name.strip_prefix("blocks.").ok_or_else(unknown)?;
        let (layer, site) = rest.split_once('.').ok_or_else(unknown)?;
        // `usize` would also take "+1" and "01", which no model prints.
        let canonical = layer == "0" || !layer.starts_with(['0', '+']);
        let layer = layer.parse().ok().filter(|_| canonical).ok_or_else(unknown)?;
        let site = Site::ALL.into_iter().find(|s| s.name() == site).ok_or_else(unknown)?;
        Ok(Self::Block { layer, site })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        let blocks = Site::ALL.map(|site| HookPoint::Block { layer: 11, site });
        let others = [
            HookPoint::Embed,
            HookPoint::PosEmbed,
            HookPoint::LnFinalScale,
            HookPoint::LnFinalNormalized,
        ];
        for point in blocks.into_iter().chain(others) {
            assert_eq!(point.to_string().parse(), Ok(point));
        }
    }

    #[test]
    fn nothing_else_parses() {
        for name in [
            "",
            "hook_embed ",
            "Hook_embed",
            "blocks.1",
            "blocks.1.",
            "blocks..hook_resid_pre",
            "blocks.-1.hook_resid_pre",
            "blocks.+1.hook_resid_pre",
            "blocks.01.hook_resid_pre",
            "blocks.1.hook_resid",
            "blocks.1.hook_resid_pre.x",
            "block.1.hook_resid_pre",
            "blocks.99999999999999999999.hook_resid_pre",
            "ln_final.hook_out",
        ] {
            let error = name.parse::<HookPoint>().unwrap_err();
            assert_eq!(error.name, name);
        }
    }
}
