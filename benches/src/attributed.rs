//! Effects of all latents on the next token by gradient × activation, beside the products of the
//! passes that this takes.

use std::hint::black_box;

use anyhow::Result;
use attribution::{AttributionConfig, Baseline, NextToken, SaeSite, Study, Target};
use model_hooks::HookPoint;
use sae_core::Activation;
use serde_json::json;

use crate::limits::{gemm, linear_layers, median};
use crate::peak::{peak_mb, reset_peak};
use crate::subject;

const N_ROWS: usize = 8;
const N_POS: usize = 128;
/// Latents kept of a TopK autoencoder.
const K: usize = 32;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// A GGUF file, a Hugging Face folder, or a hub id; SmolLM2-135M-Instruct unless given.
    #[arg(long)]
    model: Option<String>,
    /// The block after which the autoencoder reads.
    #[arg(long, default_value_t = 15)]
    layer: usize,
    /// Latents of the autoencoder.
    #[arg(long, default_value_t = 4608)]
    d_sae: usize,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let model = subject::model(options.model.as_deref())?;
    let config = model.config();
    let top_k = Activation::TopK { k: K, rescale_by_decoder_norm: false };
    let sae = subject::sae(config.d_model, options.d_sae, top_k, model.device())?;
    let ids: Vec<u32> =
        (0..N_ROWS * N_POS).map(|i| ((i + 1) * 7919 % config.d_vocab) as u32).collect();
    let rows: Vec<&[u32]> = ids.chunks(N_POS).collect();
    let metric = NextToken::new(&model, vec![Target::Difference { wanted: 1, other: 2 }; N_ROWS]);
    let site = SaeSite::new(&sae, HookPoint::resid_post(options.layer));
    let study = || -> Result<_> {
        let study = Study::new(&metric, &rows)?.with_batch_tokens(N_ROWS * N_POS);
        Ok(study.start_at(site.point)?)
    };
    let attribute = |study: &Study<'_, NextToken<'_>>| {
        study.attribute(&[site], Baseline::Zero, AttributionConfig::GRADIENT_TIMES_ACTIVATION)
    };
    let flop_per_s = gemm(config, N_ROWS * N_POS, model.device());
    let of_block: usize = linear_layers(config).iter().map(|[d_in, d_out]| 2 * d_in * d_out).sum();
    let n_below = options.layer + 1;
    let n_above = config.n_layers - n_below;
    let encoder = 2 * config.d_model * options.d_sae;
    // Above the autoencoder forth and back: gradients of activations alone, not of weights.
    let above = (2 * n_above * of_block + encoder) as f64 * (N_ROWS * N_POS) as f64;
    let below = (n_below * of_block) as f64 * (N_ROWS * N_POS) as f64;

    let say = |name: &str, seconds: f64, flop: f64| {
        let line = json!({
            "name": name, "seconds": seconds, "of_products": flop / flop_per_s / seconds,
            "gflop_per_s": flop_per_s / 1e9, "peak_rss_mb": peak_mb(),
        });
        println!("{line}");
    };
    // What fails once fails here, and not in the middle of a measurement.
    let kept = study()?;
    attribute(&kept)?;
    reset_peak();
    let whole = median(|| {
        let effects = study().map(|study| black_box(attribute(&study)));
        assert!(effects.is_ok_and(|effects| effects.is_ok()), "it was possible before");
    });
    say("attribute", whole.as_secs_f64(), below + above);
    reset_peak();
    let from_kept = median(|| {
        assert!(black_box(attribute(&kept)).is_ok(), "it was possible before");
    });
    say("attribute_from_kept", from_kept.as_secs_f64(), above);
    Ok(())
}
