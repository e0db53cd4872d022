//! Measures whole passes and training steps beside what the machine can do at most, memory beside
//! the weights, and what a crash does to training; prints a JSON line for each measurement.

#![expect(clippy::print_stdout, reason = "the measurements are what the program is for")]

mod agree;
mod attributed;
mod growth;
mod limits;
mod memory;
mod model;
mod peak;
mod quality;
mod sae_step;
mod save;
mod soak;
mod steered;
mod subject;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures passes, training steps, memory, and what a crash does to training.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Losses of a run from given weights on given batches.
    Agree(agree::Options),
    /// Effects of all latents, by gradients.
    Attribution(attributed::Options),
    /// How the time of a training step grows, as a picture.
    Growth(growth::Options),
    /// Forward passes, decoding and gradients of a model.
    Model(model::Options),
    /// What a model takes in memory, by its config alone: its weights are drawn.
    Memory(memory::Options),
    /// How good SAEs become on the same activations, ours and others'.
    Quality(quality::Options),
    /// A training step of an SAE.
    SaeStep(sae_step::Options),
    /// What saving a training run takes.
    Save(save::Options),
    /// A training run that is killed at random points and has to end with the same bits.
    Soak(soak::Options),
    /// Decoding, steered and not.
    Steering(steered::Options),
}

fn main() -> Result<()> {
    let options = Options::parse();
    examples::pool::on_the_pool(|| match options.what {
        What::Agree(options) => agree::run(&options),
        What::Attribution(options) => attributed::run(&options),
        What::Growth(options) => growth::run(&options),
        What::Model(options) => model::run(&options),
        What::Memory(options) => memory::run(&options),
        What::Quality(options) => quality::run(&options),
        What::SaeStep(options) => sae_step::run(&options),
        What::Save(options) => save::run(&options),
        What::Soak(options) => soak::run(&options),
        What::Steering(options) => steered::run(&options),
    })
}
