//! Measures whole passes beside what the machine can do at most, and prints a JSON line for each.

#![expect(clippy::print_stdout, reason = "the measurements are what the program is for")]

mod limits;
mod model;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures whole passes beside what the machine can do at most.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Forward passes, decoding and gradients of a model.
    Model(model::Options),
}

fn main() -> Result<()> {
    let options = Options::parse();
    examples::pool::on_the_pool(|| match options.what {
        What::Model(options) => model::run(&options),
    })
}
