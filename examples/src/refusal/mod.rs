//! Steering refusals with a sparse autoencoder, end to end.
//!
//! The experiment of O'Brien et al. (2024), "Steering Language Model Refusal with Sparse
//! Autoencoders", on a small chat model: train an SAE on its activations, find the latents behind
//! refusing, clamp them, and report what that does, next to controls that should do nothing.
//!
//! bytes → tokens (`chats`) → activations → latents (`sae`) → candidates (`find`) → plans (`plans`)
//! → answers (`generator`) and what else the model does (`measure`) → rates (`evaluate`) → results.
//! When to steer is learnt by `gate`; what was made is kept by `journal`.

mod asked;
mod chats;
mod evaluate;
mod find;
mod first_words;
mod gate;
mod generator;
mod journal;
pub mod ladder;
mod measure;
mod options;
mod plans;
mod sae;
pub mod said;
mod targeted;

use anyhow::{Context, Result, ensure};
use model_hooks::HookPoint;
use serde_json::json;
use steering::{Judge, PhraseJudge, Request};

pub use options::{Options, Preset, Scale, TrainingScale};

use crate::assets::{load_model, load_texts};
use crate::clock::Clock;
use crate::corpus;
use crate::device::device;
use crate::progress::tell;
use crate::results::{Condition, Generation, Results, SetKind, Settings, Treatment};
use crate::sets::{arithmetic, dialogues, questions, sample};
use crate::storage::write_whole;
use asked::Asked;
use chats::{Chats, Corpus, Dialogued};
use evaluate::{Evaluation, Led};
use gate::Gate;
use generator::Generator;
use journal::Journal;
use measure::{Measures, Questions, Tasks};
use plans::{Planner, Treatments};
use said::Conversed;

/// Where training and steering begin: position 0 carries an activation unlike all others.
const FIRST_POSITION: usize = 1;
/// Raised when what is kept in journals means something else.
const JOURNAL_VERSION: u32 = 1;

/// What a run leaves.
#[derive(Debug, Clone, PartialEq)]
pub struct Findings {
    /// Every row of the table, with what was run and how.
    pub results: Results,
    /// Every answer to a prompt.
    pub generations: Vec<Generation>,
    /// What was said besides.
    pub conversations: Vec<Conversed>,
}

/// Runs the whole experiment and tells what it does on the way; refusals are what the calibrated
/// phrases say.
///
/// # Errors
/// If something cannot be had, read or written, or does not fit.
pub fn run(options: &Options) -> Result<Findings> {
    run_judged(options, &PhraseJudge::calibrated())
}

/// The same, whoever judges.
///
/// # Errors
/// Those of the judge, too.
pub fn run_judged(options: &Options, judge: &dyn Judge) -> Result<Findings> {
    let mut clock = Clock::new();
    let scale = options.scale()?;
    let preset = options.preset()?;
    let device = device(&options.device)?;

    clock.step("Loading the model");
    let loaded = load_model(options.model.as_deref().or(preset.model), &device)?;
    let config = loaded.model.config();
    let point = HookPoint::resid_post(options.layer.unwrap_or(preset.layer));
    loaded.model.check_point(point)?;
    tell(&format!(
        "{}: {} blocks, d_model {}, vocabulary {}",
        loaded.name, config.n_layers, config.d_model, config.d_vocab
    ));
    let chats = Chats::new(&loaded);

    clock.step("Preparing text and prompts");
    let texts = load_texts(&options.text)?;
    let training = corpus::training();
    let selection = corpus::selection();
    let asked = asked::asked(options, &scale)?;
    check_lengths(&chats, &asked, &training.six_shot, config.n_ctx, scale.max_new_tokens)?;
    let corpus = chats.training_texts(&texts, &training, &scale, options.seed)?;
    let lessons = asked::lessons(options, &scale, &asked, &corpus.openings)?;
    let (tasks, led) = (tasks(options, &scale)?, led(options, &scale)?);
    let judged = options.sets.as_deref().map_or(Ok(Vec::new()), asked::judge)?;
    tell(&format!(
        "{} training texts with {} tokens, {} held-out texts",
        corpus.training.len(),
        corpus.n_training_tokens(),
        corpus.held_out.len(),
    ));
    for set in asked.summaries() {
        tell(&format!("{} prompts of {}", set.n, set.name));
    }

    clock.step(&format!("Sparse autoencoder at {point}"));
    let trained = sae::trained_sae(&loaded, &corpus, point, &scale, options)?;
    let quality = &trained.quality;
    tell(&format!(
        "TopK {} of {}, {} tokens: L0 {:.1}, FVU {:.3} (Σ|x−x̂|² / Σ|x−mean|², held-out), dead {:.1} %, \
         CE recovered {:.3}",
        scale.k,
        scale.d_sae(config.d_model),
        quality.n_tokens,
        quality.l0,
        quality.fvu,
        100.0 * quality.dead_share,
        quality.ce_recovered
    ));

    let journal = open_journal(options, &loaded.hash)?;
    clock.step("Learning when to steer");
    let gate = Gate::learn(&loaded, &chats, &lessons, &selection, &journal)?;
    let prompts: Vec<Request> = asked
        .prompts()
        .map(|(_, prompt)| chats.request(&chats::asked(&[], prompt)))
        .collect::<Result<_>>()?;
    let ids: Vec<_> = prompts.iter().map(|prompt| &prompt.ids).collect();
    let of = json!({ "asked": 1, "gate": gate, "prompts": ids });
    let fires = journal.once(&journal::key(&of), || gate.fires(&loaded, &prompts))?;
    let condition = gate.summary(&asked, &fires);
    tell(&format!(
        "{} harmful and {} harmless requests; area under the curve on the selection split {:.3}",
        condition.n_harmful, condition.n_harmless, condition.selection_auc
    ));
    for holds in &condition.holds {
        tell(&format!("fires on {} of {}", holds.rate, holds.set));
    }

    clock.step("Finding refusal latents");
    let generator = Generator::new(&loaded, &chats, &trained.sae, &journal);
    let planner = Planner::new(&loaded, &trained, point);
    let found = find::find(&generator, &planner, judge, &selection, &scale, options.seed)?;
    tell(&found.summary(&trained));

    let treatments = Treatments { planner: &planner, found: &found, seed: options.seed };
    let measures = measures(&scale, &generator, &corpus, &asked, &found.refusal_tokens, tasks)?;
    let setup = evaluate::Setup {
        generator: &generator,
        treatments: &treatments,
        measures: &measures,
        led: &led,
        gate: &gate,
        judge,
        six_shot: &training.six_shot,
        asked: &asked,
        asked_six_shot: &asked.at_most(scale.n_six_shot_prompts),
        fires: &fires,
        scale: &scale,
    };
    let evaluation = evaluate::evaluate(&setup, &mut clock)?;
    let Evaluation { rows, examples, generations, conversations, n_perplexity_tokens } = evaluation;
    if journal.n_reused() > 0 {
        tell(&format!("{} of the steps were done before", journal.n_reused()));
    }
    write_plans(options, &treatments, &gate)?;
    let plans = options.out.join("plans");
    tell(&format!(
        "chat with it: --bin chat -- --sae {}={} --plan {} --when {}",
        generator::SAE,
        trained.path().display(),
        plans.join("latent.json").display(),
        plans.join("when.json").display()
    ));

    let (steps, seconds) = clock.stop();
    let results = Results {
        model: loaded.name.clone(),
        hook_point: point.to_string(),
        sae: trained.summary(&scale, config.d_model),
        latents: found.steering_latents(&trained, &chats),
        candidates: found.candidates.clone(),
        condition: Some(condition),
        settings: Settings {
            seed: options.seed,
            device: options.device.clone(),
            max_new_tokens: scale.max_new_tokens,
            n_selection_prompts: found.n_selection_prompts,
            n_perplexity_tokens,
            unsafe_prompts: asked.names(&[SetKind::Unsafe]),
            safe_prompts: asked.names(&[SetKind::LookAlike, SetKind::Ordinary]),
            sets: asked.summaries(),
            judge: judged,
            seconds,
            steps,
            n_reused: journal.n_reused(),
        },
        headline: found.headline,
        conditional: Some(Treatment { condition: Condition::Probe, ..found.headline }),
        rows,
        examples,
    };
    Ok(Findings { results, generations, conversations })
}

/// What was made before with this model, on this device; told.
fn open_journal(options: &Options, model: &str) -> Result<Journal> {
    let settings = json!({
        "journal": JOURNAL_VERSION, "model": model, "device": options.device,
    });
    let journal = Journal::open(&options.out, &settings)?;
    let n_others = journal::others(&options.out, journal.path())?;
    if n_others > 0 {
        tell(&format!("{n_others} journals of other models or devices are left alone"));
    }
    match journal.n_read() {
        0 => tell(&format!("what is made is kept in {}", journal.path().display())),
        n => tell(&format!("going on from the {n} entries of {}", journal.path().display())),
    }
    Ok(journal)
}

/// The steering that was chosen, and when it is to be, for `chat` and others.
fn write_plans(options: &Options, treatments: &Treatments<'_>, gate: &Gate) -> Result<()> {
    let folder = options.out.join("plans");
    write_whole(&folder.join("when.json"), gate.probe.to_json()?.as_bytes())?;
    for treatment in treatments.chosen() {
        if treatment.condition == Condition::Always
            && let Some(plan) = treatments.plan(treatment)?
        {
            let name = serde_json::to_value(treatment.method)?;
            let name = name.as_str().context("a method's name")?;
            write_whole(&folder.join(format!("{name}.json")), plan.to_json()?.as_bytes())?;
        }
    }
    Ok(())
}

/// What steering is measured on beside the prompts.
fn measures<'a>(
    scale: &Scale,
    generator: &'a Generator<'a>,
    corpus: &Corpus,
    asked: &Asked,
    refusal_tokens: &[u32],
    tasks: Tasks,
) -> Result<Measures<'a>> {
    let requests = |kind: SetKind| -> Result<Vec<Request>> {
        let prompts = asked.first(kind, scale.n_measured_prompts).iter();
        prompts.map(|prompt| generator.chats.request(&chats::asked(&[], prompt))).collect()
    };
    let harmless = match requests(SetKind::Ordinary)? {
        none if none.is_empty() => requests(SetKind::LookAlike)?,
        ordinary => ordinary,
    };
    Ok(Measures {
        generator,
        texts: perplexity_texts(corpus, scale.n_perplexity_tokens),
        harmful: requests(SetKind::Unsafe)?,
        harmless,
        refusal_tokens: refusal_tokens.to_vec(),
        tasks,
    })
}

/// Questions and word problems: the authors', or those of published sets.
fn tasks(options: &Options, scale: &Scale) -> Result<Tasks> {
    let part = |questions: Vec<questions::Question>, n: usize| -> Vec<questions::Question> {
        let part = sample::of_all(questions.len(), n, options.seed);
        part.into_iter().map(|index| questions[index].clone()).collect()
    };
    let set = |set: &str, questions| Questions { set: set.into(), questions };
    let (questions, problems, problem_set) = match &options.sets {
        None => {
            let own = part(corpus::questions(), scale.n_questions);
            (vec![set("the authors' questions", own)], corpus::problems(), "the authors' problems")
        }
        Some(folder) => {
            let mmlu = questions::mmlu(&folder.join("mmlu/test"))?;
            let truthful = questions::truthful_qa(&folder.join("truthfulqa/TruthfulQA.csv"))?;
            let common = folder.join("commonsenseqa/dev_rand_split.jsonl");
            let common = questions::commonsense_qa(&common)?;
            let n = scale.n_other_questions;
            let sets = vec![
                set("MMLU", part(mmlu, scale.n_questions)),
                set("TruthfulQA (MC1)", part(truthful, n)),
                set("CommonsenseQA", part(common, n)),
            ];
            (sets, arithmetic::gsm8k(&folder.join("gsm8k/test.jsonl"))?, "GSM8K")
        }
    };
    let chosen = sample::of_all(problems.len(), scale.n_problems, options.seed);
    let problems = chosen.into_iter().map(|index| problems[index].clone()).collect();
    let (problem_set, problem_tokens) = (problem_set.into(), scale.problem_tokens);
    Ok(Tasks { questions, problems, problem_set, problem_tokens })
}

/// Conversations that are led: the authors' ladders, and dialogues of a preference set.
fn led(options: &Options, scale: &Scale) -> Result<Led> {
    let mut ladders = ladder::own();
    ladders.truncate(scale.n_ladders);
    let dialogues = match &options.sets {
        None => Vec::new(),
        Some(folder) => {
            let all = dialogues::hh(&folder.join("hh-rlhf/harmless-base-test.jsonl.gz"), 2)?;
            let part = sample::of_all(all.len(), scale.n_dialogues, options.seed);
            part.into_iter().map(|index| all[index].clone()).collect()
        }
    };
    Ok(Led { ladders, dialogues })
}

/// Unseen texts of so many tokens.
fn perplexity_texts(corpus: &Corpus, n_tokens: usize) -> Vec<Dialogued> {
    let mut left = n_tokens;
    let mut texts = Vec::new();
    for text in corpus.unseen.iter().filter(|text| text.ids.len() > 1) {
        if left == 0 {
            break;
        }
        let n = text.ids.len().min(left + 1);
        let (ids, n_prompt) = (text.ids[..n].to_vec(), text.n_prompt.min(n));
        texts.push(Dialogued { ids, n_prompt, start: text.start });
        left -= n - 1;
    }
    texts
}

/// A prompt that does not fit is better found before an autoencoder is trained than after.
fn check_lengths(
    chats: &Chats<'_>,
    asked: &Asked,
    six_shot: &[corpus::Turn],
    n_ctx: usize,
    max_new_tokens: usize,
) -> Result<()> {
    for (_, prompt) in asked.prompts() {
        let n = chats.prompt(six_shot, prompt)?.len() + max_new_tokens;
        let start: String = prompt.chars().take(60).collect();
        ensure!(
            n <= n_ctx,
            "the prompt {start:?}… needs {n} positions with six examples before it and its answer \
             after it, the model's context has {n_ctx}: shorten it"
        );
    }
    Ok(())
}

/// Errors of the libraries with what was being done.
trait During<T> {
    fn during(self, what: &'static str) -> Result<T>;
}

impl<T, E: std::error::Error + Send + Sync + 'static> During<T> for std::result::Result<T, E> {
    fn during(self, what: &'static str) -> Result<T> {
        self.with_context(|| format!("while {what}"))
    }
}
