//! Trains sparse autoencoders by a config file, and shows how good they are.

#![expect(clippy::print_stderr, reason = "this is what a program says")]

use std::process::ExitCode;

use clap::Parser;
use examples::train::{Options, Outcome, run};
use examples::{allocator, pool};

fn main() -> ExitCode {
    allocator::keep_pages();
    let options = Options::parse();
    match pool::on_the_pool(|| run(&options)) {
        Ok(Outcome::Finished) => ExitCode::SUCCESS,
        Ok(Outcome::Stopped) => ExitCode::from(3),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
