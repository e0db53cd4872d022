//! What a program says on the way: titles, lines, progress bars.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar of `length` steps, drawn on the terminal; nothing is drawn where there is none.
pub fn bar(label: &'static str, length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "  {prefix:<22} {bar:32.cyan/dim} {pos:>7}/{len} {elapsed:>4} (eta {eta}) {msg}",
    );
    let bar = ProgressBar::new(length)
        .with_prefix(label)
        .with_style(style.expect("the template is well-formed"));
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// Says what begins.
#[expect(clippy::print_stdout, reason = "this is what a program says")]
pub fn step(title: &str) {
    println!("\n{title}");
}

/// Says something about what is being done.
#[expect(clippy::print_stdout, reason = "this is what a program says")]
pub fn tell(line: &str) {
    println!("  {line}");
}
