//! Chats with a model in the terminal, steered by a plan.

#![expect(clippy::print_stderr, reason = "this is what a program says")]

use std::io;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use examples::assets::load_model;
use examples::chat::{HELP, Options, Session, read_saes};
use examples::{allocator, device, pool};

fn main() -> ExitCode {
    allocator::keep_pages();
    let options = Options::parse();
    match pool::on_the_pool(|| chat(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn chat(options: &Options) -> Result<()> {
    let device = device::device(&options.device)?;
    let saes = read_saes(&options.saes, &device)?;
    let loaded = load_model(options.model.as_deref(), &device)?;
    let mut session = Session::new(options, &loaded, &saes)?;
    eprintln!("{}\n{HELP}", loaded.name);
    session.run(io::stdin().lock(), &mut io::stdout().lock())
}
