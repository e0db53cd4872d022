//! Opens up a preference model: which latents raise and lower its rewards, proven by ablation.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is what a program says")]

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use examples::preference::{Options, render, run};
use examples::{allocator, pool, storage};

fn main() -> ExitCode {
    allocator::keep_pages();
    let options = Options::parse();
    match pool::on_the_pool(|| preference(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn preference(options: &Options) -> Result<()> {
    let results = run(options)?;
    let json = serde_json::to_string(&results)?;
    for (name, text) in [("results.json", json), ("report.html", render(&results)?)] {
        storage::write_whole(&options.out.join(name), text.as_bytes())?;
    }
    let page = options.out.join("report.html");
    let page = page.canonicalize().with_context(|| format!("cannot find {}", page.display()))?;
    println!("\nOpen {} ({:.0} s)", page.display(), results.seconds);
    Ok(())
}
