//! How long a run takes, step by step.

use std::time::Instant;

use crate::progress::step;

/// How long each step takes.
pub(crate) struct Clock {
    start: Instant,
    last: Instant,
    running: Option<String>,
    steps: Vec<(String, f64)>,
}

impl Clock {
    pub(crate) fn new() -> Self {
        let now = Instant::now();
        Self { start: now, last: now, running: None, steps: Vec::new() }
    }

    /// Says what begins.
    pub(crate) fn step(&mut self, title: &str) {
        self.end();
        step(title);
        self.running = Some(title.to_owned());
    }

    /// Ends a part of the step that is running.
    pub(crate) fn lap(&mut self, part: &str) {
        let seconds = self.last.elapsed().as_secs_f64();
        let step = self.running.as_deref().unwrap_or_default();
        self.steps.push((format!("{step}: {part}"), seconds));
        self.last = Instant::now();
    }

    fn end(&mut self) {
        if let Some(title) = self.running.take() {
            self.steps.push((title, self.last.elapsed().as_secs_f64()));
        }
        self.last = Instant::now();
    }

    pub(crate) fn stop(mut self) -> (Vec<(String, f64)>, f64) {
        self.end();
        (self.steps, self.start.elapsed().as_secs_f64())
    }
}
