//! Steers a chat model's refusals with a sparse autoencoder trained on its own activations.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is what a program says")]

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use examples::refusal::{Findings, Options, run};
use examples::{allocator, pool, report, storage};
use serde::Serialize;

fn main() -> ExitCode {
    allocator::keep_pages();
    let options = Options::parse();
    match pool::on_the_pool(|| refusal(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn refusal(options: &Options) -> Result<()> {
    let Findings { results, generations, conversations } = run(options)?;
    println!("\n{}", report::table(&results));
    for example in &results.examples {
        println!("{}", report::example(example));
    }
    let json = serde_json::to_string_pretty(&results)?;
    for (name, text) in [
        ("generations.jsonl", lines(&generations)?),
        ("conversations.jsonl", lines(&conversations)?),
        ("results.json", json),
        ("report.html", report::render(&results)?),
    ] {
        storage::write_whole(&options.out.join(name), text.as_bytes())?;
    }
    let page = options.out.join("report.html");
    let page = page.canonicalize().with_context(|| format!("cannot find {}", page.display()))?;
    println!("Open {}", page.display());
    Ok(())
}

fn lines(items: &[impl Serialize]) -> Result<String, serde_json::Error> {
    items.iter().map(|item| serde_json::to_string(item).map(|line| line + "\n")).collect()
}
