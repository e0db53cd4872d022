//! Chatting with a model that a plan steers.

mod command;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use burn::tensor::Device;
use clap::Parser;
use model_hooks::text::{Message, Role};
use model_hooks::{GenerateConfig, HookPoint, NewToken, SharedPrefix};
use sae_core::{Sae, format};
use steering::plan::{Plan, PlanIntervention, PlanModel, PlanSae, PlanStep};
use steering::{
    LatentEdit, LatentReader, LatentWatch, Reading, Region, Remainder, RequestProbe, Steerings,
};

pub use command::{Command, HELP};

use crate::assets::LoadedModel;
use crate::requests::last_request;
use crate::storage::write_whole;

const NOTHING_STEERS: &str =
    "nothing steers yet: /steer PATH reads a plan, /clamp LATENT=VALUE makes one";

/// Chats with a model in the terminal, steered by a plan, and shows a latent at every token.
#[derive(Debug, Clone, Parser)]
#[command(name = "chat", version)]
pub struct Options {
    /// A GGUF file, a Hugging Face folder, or a hub id; SmolLM2-135M-Instruct by default
    #[arg(long, value_name = "PATH|ID")]
    pub model: Option<String>,
    /// Autoencoders that the plan names, in any format that is read here
    #[arg(long = "sae", value_name = "NAME=PATH")]
    pub saes: Vec<String>,
    /// What steers, from the beginning; /clamp needs none
    #[arg(long, value_name = "PATH")]
    pub plan: Option<PathBuf>,
    /// When it steers: the probe of requests that refusal writes beside its plans; always without
    #[arg(long, value_name = "PATH")]
    pub when: Option<PathBuf>,
    /// The latent to show
    #[arg(long, value_name = "LATENT")]
    pub watch: Option<usize>,
    /// Where latents are read and clamped, if the autoencoder's file does not say so
    #[arg(long, value_name = "POINT")]
    pub point: Option<HookPoint>,
    /// Tokens of an answer, at most
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub max_new_tokens: usize,
    /// The backend that computes
    #[arg(long, env = "BURN_DEVICE", default_value = "flex", value_name = "NAME")]
    pub device: String,
}

/// Reads the autoencoders that were given as `NAME=PATH`.
///
/// # Errors
/// If one is given otherwise, twice, or cannot be read.
pub fn read_saes(given: &[String], device: &Device) -> Result<BTreeMap<String, Sae>> {
    let mut saes = BTreeMap::new();
    for given in given {
        let (name, path) = given
            .split_once('=')
            .ok_or_else(|| anyhow!("--sae takes NAME=PATH, and got {given:?}"))?;
        let sae = format::read(Path::new(path), device)
            .with_context(|| format!("the autoencoder {name:?} cannot be read"))?;
        ensure!(saes.insert(name.to_owned(), sae).is_none(), "--sae gives {name:?} twice");
    }
    Ok(saes)
}

/// A conversation.
pub struct Session<'a> {
    loaded: &'a LoadedModel,
    saes: &'a BTreeMap<String, Sae>,
    point: Option<HookPoint>,
    config: GenerateConfig,
    messages: Vec<Message>,
    plan: Option<Plan>,
    /// The plan at work.
    steerings: Steerings<'a>,
    is_on: bool,
    /// Tells the requests whose answers are steered; all are without it.
    when: Option<RequestProbe>,
    watched: Option<(LatentReader<'a>, HookPoint)>,
}

impl<'a> Session<'a> {
    /// An empty one, steered by the options' plan if there is one.
    ///
    /// # Errors
    /// If the plan is none or does not fit, or the latent to watch cannot be read.
    pub fn new(
        options: &Options,
        loaded: &'a LoadedModel,
        saes: &'a BTreeMap<String, Sae>,
    ) -> Result<Self> {
        let stop_ids = loaded.model.config().special_tokens.eos.clone();
        let mut session = Self {
            loaded,
            saes,
            point: options.point,
            config: GenerateConfig::greedy(options.max_new_tokens, stop_ids),
            messages: Vec::new(),
            plan: None,
            steerings: Steerings::default(),
            is_on: false,
            when: None,
            watched: None,
        };
        if let Some(path) = &options.plan {
            session.read_plan(path)?;
        }
        if let Some(path) = &options.when {
            session.read_probe(path)?;
        }
        session.watch(options.watch)?;
        Ok(session)
    }

    /// Answers lines until they or the user end.
    ///
    /// # Errors
    /// If the terminal fails. What the user got wrong is said, and no error.
    pub fn run(&mut self, lines: impl BufRead, out: &mut impl Write) -> Result<()> {
        self.prompt(out)?;
        for line in lines.lines() {
            match Command::parse(&line?) {
                Ok(Some(Command::Quit)) => return Ok(()),
                Ok(Some(Command::Say(text))) => {
                    let n_messages = self.messages.len();
                    if let Err(error) = self.answer(text, out) {
                        // A conversation too long for the model, for one: it goes on without.
                        self.messages.truncate(n_messages);
                        writeln!(out, "\n{error:#}")?;
                    }
                }
                Ok(Some(command)) => match self.obey(command) {
                    Ok(said) => writeln!(out, "{said}")?,
                    Err(error) => writeln!(out, "{error:#}")?,
                },
                Ok(None) => {}
                Err(error) => writeln!(out, "{error:#}")?,
            }
            self.prompt(out)?;
        }
        Ok(())
    }

    fn prompt(&self, out: &mut impl Write) -> Result<()> {
        write!(out, "{}> ", if self.is_on { "steered" } else { "plain" })?;
        out.flush()?;
        Ok(())
    }

    fn obey(&mut self, command: Command) -> Result<String> {
        match command {
            Command::Steer(Some(path)) => {
                self.read_plan(Path::new(&path))?;
                Ok(format!("Steering by {path}."))
            }
            Command::Steer(None) => {
                ensure!(self.plan.is_some(), NOTHING_STEERS);
                self.is_on = true;
                Ok("Steering.".into())
            }
            Command::Off => {
                self.is_on = false;
                Ok("Not steering.".into())
            }
            Command::When(Some(path)) => {
                self.read_probe(Path::new(&path))?;
                Ok(format!("Steering where the probe {path} fires."))
            }
            Command::When(None) => {
                self.when = None;
                Ok("Steering every answer.".into())
            }
            Command::Clamp(values) => {
                self.steer_by(self.clamping(&values)?)?;
                let clamped = values.iter().map(|(latent, value)| format!("{latent} to {value}"));
                Ok(format!("Clamping {}.", clamped.collect::<Vec<_>>().join(", ")))
            }
            Command::Watch(latent) => {
                self.watch(latent)?;
                Ok(latent.map_or("Watching nothing.".into(), |i| format!("Watching latent {i}.")))
            }
            Command::Save(path) => {
                let plan = self.plan.as_ref().ok_or_else(|| anyhow!(NOTHING_STEERS))?;
                write_whole(&std::path::absolute(&path)?, plan.to_json()?.as_bytes())?;
                Ok(format!("Saved {path}."))
            }
            Command::New => {
                self.messages.clear();
                Ok("A new conversation.".into())
            }
            Command::Help => Ok(HELP.into()),
            Command::Say(_) | Command::Quit => unreachable!("not among what is obeyed"),
        }
    }

    /// Steers by a plan of a file, if it fits; else by what was before.
    fn read_plan(&mut self, path: &Path) -> Result<()> {
        let place = || format!("the plan {}", path.display());
        let json = std::fs::read_to_string(path).with_context(place)?;
        let plan = Plan::from_json(&json).with_context(place)?;
        self.steer_by(plan).with_context(place)
    }

    /// Steers where a probe of a file fires, if it fits; else as before.
    fn read_probe(&mut self, path: &Path) -> Result<()> {
        let place = || format!("the probe {}", path.display());
        let json = std::fs::read_to_string(path).with_context(place)?;
        let probe = RequestProbe::from_json(&json).with_context(place)?;
        probe.check(&self.loaded.model, Some(&self.loaded.hash)).with_context(place)?;
        self.when = Some(probe);
        Ok(())
    }

    fn steer_by(&mut self, plan: Plan) -> Result<()> {
        for sae in &plan.saes {
            let name = &sae.name;
            ensure!(
                self.saes.contains_key(name),
                "it steers by an autoencoder {name:?} that is not loaded: start with --sae {name}=PATH"
            );
        }
        let saes = self.saes.iter().map(|(name, sae)| (name.clone(), sae)).collect();
        self.steerings = plan.bind(&self.loaded.model, Some(&self.loaded.hash), &saes)?;
        (self.plan, self.is_on) = (Some(plan), true);
        Ok(())
    }

    /// The autoencoder that commands are about, and where it is read.
    fn sae(&self) -> Result<(&'a String, &'a Sae, HookPoint)> {
        let mut saes = self.saes.iter();
        let (name, sae) = saes
            .next()
            .ok_or_else(|| anyhow!("no autoencoder is loaded: start with --sae NAME=PATH"))?;
        ensure!(
            saes.next().is_none(),
            "several autoencoders are loaded: start with one --sae, or /steer by a plan that names them"
        );
        let trained_at = sae.config().metadata.hook_name.as_ref();
        let point = match (self.point, trained_at) {
            (Some(point), _) => point,
            (None, Some(name)) => name.parse().with_context(|| {
                format!(
                    "the autoencoder says that it belongs at {name:?}: start with --point POINT"
                )
            })?,
            (None, None) => {
                return Err(anyhow!(
                    "the autoencoder does not say where it belongs: start with --point POINT, such \
                     as blocks.12.hook_resid_post"
                ));
            }
        };
        Ok((name, sae, point))
    }

    fn clamping(&self, values: &[(usize, f32)]) -> Result<Plan> {
        let (name, sae, point) = self.sae()?;
        let name_of_model = Some(self.loaded.name.clone());
        let sha256 = Some(self.loaded.hash.clone());
        let model = PlanModel { name: name_of_model, sha256, ..PlanModel::of(&self.loaded.model) };
        let first = sae.config().metadata.first_position();
        let edits = values.iter().map(|&(latent, value)| LatentEdit::clamp(latent, value));
        let mut plan = Plan::new(model);
        plan.saes = vec![PlanSae::of(name, sae)];
        plan.steps = vec![PlanStep {
            points: vec![point],
            intervention: PlanIntervention::Latents {
                sae: name.clone(),
                edits: edits.collect(),
                remainder: Remainder::Keep,
                reading: Reading::Exact,
            },
            // Position 0 is unlike all others, whether the file says so or not.
            region: Region::from_position(first.unwrap_or(1)),
            condition: None,
        }];
        Ok(plan)
    }

    fn watch(&mut self, latent: Option<usize>) -> Result<()> {
        self.watched = match latent {
            None => None,
            Some(latent) => {
                let (_, sae, point) = self.sae()?;
                self.loaded.model.check_point(point)?;
                sae.check_fits(self.loaded.model.config().d_model)?;
                Some((LatentReader::new(sae, &[latent], Reading::Exact)?, point))
            }
        };
        Ok(())
    }

    fn answer(&mut self, text: String, out: &mut impl Write) -> Result<()> {
        let LoadedModel { model, tokenizer, template, .. } = self.loaded;
        self.messages.push(Message::new(Role::User, text));
        let request = last_request(tokenizer, template, &self.messages)?;
        let steers = match &self.when {
            Some(probe) if self.is_on => {
                let fires = probe.fires(model, std::slice::from_ref(&request))?[0];
                writeln!(out, "⟨the probe {}⟩", if fires { "fires" } else { "does not fire" })?;
                fires
            }
            _ => self.is_on,
        };
        // The last value seen is that of the token that was run last.
        let last = RefCell::new(None);
        let mut watch = self.watched.clone().map(|(reader, point)| {
            LatentWatch::new(reader, point, |values| *last.borrow_mut() = values.last().copied())
        });
        let mut steerings = steers.then_some(&mut self.steerings);
        let (mut n_active, mut largest) = (0, 0f32);
        let mut shown = 0;
        let mut said = String::new();
        let mut written = Ok(());
        let observe = |new: NewToken<'_>| {
            // A token runs only once it has been chosen: its value comes with the next one.
            if new.answer.len() > 1
                && let Some(value) = *last.borrow()
                && value != 0.0
            {
                (n_active, largest) = (n_active + 1, largest.max(value));
                written = write!(out, "⟨{value:.1}⟩");
            }
            // Of a token that ends within a character, nothing is shown yet.
            if let Ok(text) = tokenizer.decode_plain(new.answer)
                && !text.ends_with(char::REPLACEMENT_CHARACTER)
                && let Some(more) = text.get(shown..)
                && written.is_ok()
            {
                written = write!(out, "{more}").and_then(|()| out.flush());
                shown = text.len();
                said = text;
            }
            match written {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        };
        let none = SharedPrefix::default();
        let hook = &mut (&mut watch, &mut steerings);
        let answers = model.generate(&[request.ids], &none, &self.config, hook, observe)?;
        written?;
        writeln!(out)?;
        if let Some((reader, _)) = &self.watched {
            // The last token is chosen, and not run.
            let n = answers[0].len() - 1;
            let latent = reader.latents()[0];
            writeln!(
                out,
                "⟨latent {latent}: active on {n_active} of {n} tokens, {largest:.1} at most⟩"
            )?;
        }
        self.messages.push(Message::new(Role::Assistant, said.trim()));
        Ok(())
    }
}
