//! Measures whole passes beside what the machine can do at most, and prints a JSON line for each;
//! or kills a training run until it is believed that this does it no harm.

#![expect(clippy::print_stdout, reason = "the measurements are what the program is for")]

mod limits;
mod model;
mod soak;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures whole passes beside what the machine can do at most, and what a crash does to training.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Forward passes, decoding and gradients of a model.
    Model(model::Options),
    /// A training run that is killed at random points and has to end with the same bits.
    Soak(soak::Options),
}

fn main() -> Result<()> {
    match Options::parse().what {
        What::Model(options) => model::run(&options),
        What::Soak(options) => soak::run(&options),
    }
}
