//! Measures whole models, and prints a JSON line for each measurement: passes beside what the
//! machine can do at most, and memory beside the weights.

#![expect(clippy::print_stdout, reason = "the measurements are what the program is for")]

mod limits;
mod memory;
mod model;
mod peak;
mod sae_step;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures whole models: their passes, and their memory.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Forward passes, decoding and gradients of a model.
    Model(model::Options),
    /// What a model takes in memory, by its config alone: its weights are drawn.
    Memory(memory::Options),
    /// A training step of an SAE.
    SaeStep(sae_step::Options),
}

fn main() -> Result<()> {
    let options = Options::parse();
    examples::pool::on_the_pool(|| match options.what {
        What::Model(options) => model::run(&options),
        What::Memory(options) => memory::run(&options),
        What::SaeStep(options) => sae_step::run(&options),
    })
}
