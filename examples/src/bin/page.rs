//! Makes the page of the refusal experiment anew, from its `results.json`.

#![expect(clippy::print_stderr, reason = "this is what a program says")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use examples::report;
use examples::results::Results;
use examples::storage::write_whole;

/// Makes the page of the refusal experiment anew, from its results.
#[derive(Debug, Parser)]
#[command(name = "page", version)]
struct Options {
    /// `results.json`, as the program `refusal` writes it
    results: PathBuf,
    /// Where the page goes
    #[arg(long, default_value = "report.html", value_name = "PATH")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let Options { results, out } = Options::parse();
    match page(&results, &out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn page(results: &Path, out: &Path) -> Result<()> {
    let place = || results.display().to_string();
    let json = fs::read_to_string(results).with_context(place)?;
    let results: Results = serde_json::from_str(&json).with_context(place)?;
    let page = report::render(&results)?;
    write_whole(&std::path::absolute(out)?, page.as_bytes())?;
    eprintln!("{}", out.display());
    Ok(())
}
