//! A training run between two steps.

use burn::tensor::{Device, Tensor, TensorData};

use super::ages::{Ages, n_active_on};
use super::config::TrainConfig;
use super::moments::{Clipped, Moments, Optimizer};
use super::objective::{
    Batch, Differentiated, Kind, Objective, RunningThreshold, Smallest, Term, Upstream,
};
use super::parameters::Parameters;
use super::reduce::{Gather, Reduce, ReduceError};
use super::row_order::random_stream;
use crate::activation::Activation;
use crate::sae::{Sae, row_norms};

/// Random streams from here on belong to the steps' resampling.
const RESAMPLING_STREAM: u64 = 1 << 63;

/// All that a run has to remember: with the configuration and the activations, the rest of the
/// run follows from it.
#[derive(Debug, Clone)]
pub struct TrainState {
    /// The weights, for inputs times `input_scale`.
    pub parameters: Parameters,
    /// What the optimiser remembers.
    pub moments: Moments,
    /// Steps done, those that were skipped included.
    pub step: usize,
    /// Steps that were skipped.
    pub n_skipped: usize,
    /// What activations are multiplied by.
    pub input_scale: f64,
    /// How long latents have been silent.
    pub ages: Ages,
    /// The running threshold of a selection over the batch, once there is one.
    pub threshold: Option<f64>,
}

/// What a step goes by: the loss on its batch, and what else it has to know of it.
struct Seen {
    loss: f64,
    terms: Vec<(Term, f64)>,
    gradient: Parameters,
    n_rows: usize,
    /// On how many rows each latent is active, `[d_sae]`.
    n_active_on: Tensor<1>,
    /// What a running threshold follows.
    smallest: Smallest,
    is_finite: bool,
    /// What dead latents may begin again with.
    batch: Batch,
    row_errors: Tensor<1>,
}

impl Seen {
    /// The same of the batch that all workers have a part of. Its rows are put together only where
    /// they are asked for; without, those of this worker stay.
    fn by_all(
        self,
        threshold: Option<RunningThreshold>,
        with_rows: bool,
        workers: &mut impl Reduce,
    ) -> Result<Self, ReduceError> {
        let device = self.n_active_on.device();
        let n_workers = workers.n_workers();
        let numbers = |numbers: &[f64]| -> Tensor<2> {
            let numbers: Vec<f32> = numbers.iter().map(|&number| number as f32).collect();
            let shape = [1, numbers.len()];
            Tensor::from_data(TensorData::new(numbers, shape), &device)
        };
        let host = |tensor: Tensor<2>| tensor.into_data().iter::<f64>().collect::<Vec<_>>();

        let mut told = vec![self.loss, if self.is_finite { 0.0 } else { f64::NAN }];
        told.extend(self.terms.iter().map(|(_, value)| value));
        let told = host(workers.mean(numbers(&told))?);
        let terms = self.terms.iter().map(|(term, _)| *term).zip(told[2..].iter().copied());
        let smallest = match threshold {
            None => self.smallest,
            Some(rule) => {
                let Smallest { value, n } = self.smallest;
                let all = host(workers.rows(numbers(&[value, n as f64]))?);
                let of_each = |pair: &[f64]| Smallest { value: pair[0], n: pair[1] as usize };
                rule.of_all(all.chunks(2).map(of_each))
            }
        };
        let named = self.gradient.named().map(|(name, own)| Ok((name, workers.mean(own.clone())?)));
        let gradient = named.collect::<Result<Parameters, _>>()?;
        let n_active_on = workers.sum(self.n_active_on)?;
        let (mut batch, mut row_errors) = (self.batch, self.row_errors);
        if with_rows {
            batch.x = workers.rows(batch.x)?;
            batch.target = batch.target.map(|target| workers.rows(target)).transpose()?;
            row_errors = workers.rows(row_errors.unsqueeze_dim(1))?.squeeze_dim(1);
        }
        Ok(Self {
            loss: told[0],
            terms: terms.collect(),
            gradient,
            n_rows: self.n_rows * n_workers,
            n_active_on,
            smallest,
            is_finite: told[1] == 0.0,
            batch,
            row_errors,
        })
    }
}

/// What became of a step.
#[derive(Debug, Clone, PartialEq)]
pub enum StepOutcome {
    /// The parameters moved.
    Taken(StepReport),
    /// The loss, its gradient or an activation was not finite: all is as it was, but for the counts of steps.
    Skipped {
        /// The loss.
        loss: f64,
    },
}

/// What a step saw.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct StepReport {
    /// The loss before the step.
    pub loss: f64,
    /// What it is the sum of.
    pub terms: Vec<(Term, f64)>,
    /// Latents that are not zero, per activation.
    pub l0: f64,
    /// Dead latents that were given new weights.
    pub n_resampled: usize,
}

impl TrainState {
    /// Before the first step.
    pub fn new(parameters: Parameters, input_scale: f64, optimizer: &Optimizer) -> Self {
        Self {
            moments: Moments::new(&parameters, optimizer),
            ages: Ages::new(parameters.d_sae()),
            parameters,
            step: 0,
            n_skipped: 0,
            input_scale,
            threshold: None,
        }
    }

    /// The same on another device.
    pub fn to_device(self, device: &Device) -> Self {
        let parameters = self.parameters.to_device(device);
        Self { parameters, moments: self.moments.to_device(device), ..self }
    }

    /// One step on a batch of scaled activations, out of `n_steps`.
    ///
    /// # Panics
    /// If the configuration is not valid, or of another SAE than the state.
    pub fn step(
        &mut self,
        batch: impl Into<Batch>,
        config: &TrainConfig,
        n_steps: usize,
    ) -> StepOutcome {
        let batch = batch.into();
        let (objective, dead) = self.begin(config, n_steps);
        let found = objective.differentiate(&self.parameters, &batch, &dead);
        let seen = self.seen(&objective, batch, found);
        self.take(&objective, seen, config, n_steps)
    }

    /// One step together with other workers, on this one's part of the batch. All have the same
    /// state and configuration, and parts of one size; all have the same state, bit for bit, after.
    ///
    /// The loss is the mean of those of the parts. Where a kind couples the rows of a batch (a
    /// selection over it, the variance that errors are measured in, the number of latents per row
    /// that is aimed at), it couples those of each part.
    ///
    /// # Errors
    /// If another worker is gone. No step was taken.
    ///
    /// # Panics
    /// As [`step`](Self::step).
    pub fn step_among(
        &mut self,
        part: impl Into<Batch>,
        config: &TrainConfig,
        n_steps: usize,
        workers: &mut impl Reduce,
    ) -> Result<StepOutcome, ReduceError> {
        let part = part.into();
        let (objective, dead) = self.begin(config, n_steps);
        let found = objective.differentiate(&self.parameters, &part, &dead);
        let is_resampling = config.resampling.is_some_and(|it| it.is_due(self.step + 1));
        let seen = self.seen(&objective, part, found);
        let seen = match workers.n_workers() {
            1 => seen,
            _ => seen.by_all(objective.running_threshold(), is_resampling, workers)?,
        };
        Ok(self.take(&objective, seen, config, n_steps))
    }

    /// The same with a loss of what comes behind the reconstruction:
    /// [`Objective::differentiate_with`].
    ///
    /// # Errors
    /// What `downstream` fails with. No step was taken.
    ///
    /// # Panics
    /// As [`step`](Self::step), and for a matching pursuit.
    pub fn step_with<E>(
        &mut self,
        batch: impl Into<Batch>,
        config: &TrainConfig,
        n_steps: usize,
        downstream: impl FnMut(Tensor<2>) -> Result<Upstream, E>,
    ) -> Result<StepOutcome, E> {
        let batch = batch.into();
        let (objective, dead) = self.begin(config, n_steps);
        let found = objective.differentiate_with(&self.parameters, &batch, &dead, downstream)?;
        let seen = self.seen(&objective, batch, found);
        Ok(self.take(&objective, seen, config, n_steps))
    }

    /// What the next step minimises, and the latents that are dead in it.
    fn begin(&mut self, config: &TrainConfig, n_steps: usize) -> (Objective, Vec<u32>) {
        let objective = config.objective_at(self.step, n_steps);
        objective.project(&mut self.parameters);
        (objective, self.ages.dead(config.dead_after))
    }

    /// What a step goes by.
    fn seen(&self, objective: &Objective, batch: Batch, found: Differentiated) -> Seen {
        let Differentiated { loss, terms, gradient, latents, row_errors } = found;
        let smallest = match &objective.kind {
            Kind::Selecting(kind) => kind.threshold.map(|rule| {
                let measured = kind.measured(&self.parameters, &latents);
                let [_, k] = measured.dims();
                let values: Vec<f32> = measured.into_data().try_into_vec_as().expect("floats");
                rule.smallest(&values, k)
            }),
            _ => None,
        };
        Seen {
            loss,
            terms,
            gradient,
            n_rows: latents.n_rows(),
            n_active_on: n_active_on(&latents),
            smallest: smallest.unwrap_or_default(),
            is_finite: loss.is_finite() && batch.hides_nothing(),
            batch,
            row_errors,
        }
    }

    /// Moves the parameters, and everything that goes with a step.
    fn take(
        &mut self,
        objective: &Objective,
        seen: Seen,
        config: &TrainConfig,
        n_steps: usize,
    ) -> StepOutcome {
        let Seen { loss, terms, gradient, n_rows, n_active_on, .. } = seen;
        let gradient = config.decoder.project(&self.parameters, gradient);
        let clipped = match config.clip_norm {
            Some(limit) => clipped(gradient, limit),
            None => gradient.are_finite().then_some(Clipped { gradient, scale: 1.0 }),
        };
        let step = self.step;
        self.step += 1;
        let Some(gradient) = clipped.filter(|_| seen.is_finite) else {
            self.n_skipped += 1;
            return StepOutcome::Skipped { loss };
        };
        if let Some(rule) = objective.running_threshold() {
            self.threshold = rule.next(self.threshold, seen.smallest, step);
        }
        let learning_rate = config.schedule.at(step, n_steps);
        let n_taken = self.step - self.n_skipped;
        let Self { parameters, moments, .. } = self;
        let (optimizer, decoder) = (&config.optimizer, config.decoder);
        moments.update(parameters, gradient, n_taken, learning_rate, optimizer, decoder);
        let n_active = self.ages.update(n_active_on, n_rows);
        let mut revived = Vec::new();
        if let Some(resampling) = config.resampling
            && resampling.is_due(self.step)
        {
            revived = resampling.resample(
                &mut self.parameters,
                &seen.batch,
                objective,
                &seen.row_errors,
                &self.ages.dead(config.dead_after),
                random_stream(config.seed, RESAMPLING_STREAM + self.step as u64),
            );
            self.moments.forget(&revived);
            self.ages.revive(&revived);
        }
        let l0 = n_active as f64 / n_rows as f64;
        StepOutcome::Taken(StepReport { loss, terms, l0, n_resampled: revived.len() })
    }

    /// The SAE as trained so far, for raw activations, with decoder rows of norm 1 unless it ranks
    /// its latents without their norms. What was selected over a batch is selected by the running
    /// threshold, zero before there is one.
    ///
    /// # Panics
    /// If the configuration is of another SAE than the state.
    pub fn sae(&self, config: &TrainConfig) -> Sae {
        let mut weights = self.parameters.to_weights();
        let [d_in, d_sae] = weights.w_enc.dims();
        let sae_config = config.sae(d_in);
        if sae_config.activation == Activation::JumpRelu && weights.threshold.is_none() {
            let norms = row_norms(weights.w_dec.clone());
            let threshold = norms.ones_like().mul_scalar(self.threshold.unwrap_or(0.0));
            // What a threshold was measured in: folding the norms brings it back.
            weights.threshold = Some(match ranks_by_norms(&config.objective) {
                true => threshold / norms,
                false => threshold,
            });
        }
        debug_assert_eq!(d_sae, config.d_sae);
        let sae = Sae::new(sae_config, weights).expect("a validated configuration");
        let sae = sae.fold_input_scale(self.input_scale);
        sae.clone().fold_decoder_norms().unwrap_or(sae)
    }
}

fn ranks_by_norms(objective: &Objective) -> bool {
    match &objective.kind {
        Kind::Selecting(kind) => kind.rescale_by_decoder_norm,
        _ => false,
    }
}

/// The gradient, at most `limit` long, if it is finite.
fn clipped(gradient: Parameters, limit: f64) -> Option<Clipped> {
    match gradient.norm() {
        norm if !norm.is_finite() => None,
        norm if norm > limit => Some(Clipped { gradient, scale: limit / norm }),
        _ => Some(Clipped { gradient, scale: 1.0 }),
    }
}
