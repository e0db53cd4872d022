//! Some latents of some SAEs, and how much of a metric they are by themselves.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::{Tensor, TensorData};
use kernels::sparse_decode;
use model_hooks::{Hook, HookError, HookPoint, Positions, RowEdit};
use sae_core::Sae;

use crate::attribution::SiteEffects;
use crate::error::AttributionError;
use crate::metric::Metric;
use crate::site::{SaeMeans, SaeSite};
use crate::study::Study;

/// Latents of some SAEs: the nodes of a graph that is left when the others are pruned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Circuit {
    /// For each site, in their order.
    pub latents: Vec<BTreeSet<usize>>,
}

/// What what is pruned is changed to.
#[derive(Debug, Clone, Copy)]
pub enum Pruned<'a> {
    /// Nothing.
    Zero,
    /// Means over some text, for each site.
    Mean(&'a [SaeMeans]),
}

/// What becomes of the errors of the SAEs where all else is pruned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Errors {
    /// They stay: part of every circuit.
    Kept,
    /// They are pruned too, and part of none.
    Pruned,
}

/// How much of a metric a circuit is (Marks et al., 2024).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CircuitShare {
    /// Latents of the circuit.
    pub n_latents: usize,
    /// `(m(C) − m(∅)) / (m(M) − m(∅))`, of sums over conversations: `m(C)` with everything but the
    /// circuit pruned, `m(∅)` with everything, `m(M)` with nothing.
    pub faithfulness: f64,
    /// The same of what is not in the circuit, `M ∖ C`: small where the circuit is all there is.
    pub completeness: f64,
}

impl Circuit {
    /// The latents with the largest effects by absolute value, summed over positions and
    /// conversations, over all sites together.
    pub fn largest(effects: &[SiteEffects], n_latents: usize) -> Self {
        let mut order: Vec<(usize, usize, f64)> = effects
            .iter()
            .enumerate()
            .flat_map(|(site, effects)| {
                let by_latent: BTreeMap<usize, _> = effects.by_latent();
                by_latent.into_iter().map(move |(l, effect)| (site, l, effect.change().abs()))
            })
            .collect();
        order.sort_by(|a, b| b.2.total_cmp(&a.2));
        let mut latents = vec![BTreeSet::new(); effects.len()];
        for (site, latent, _) in order.into_iter().take(n_latents) {
            latents[site].insert(latent);
        }
        Self { latents }
    }

    /// Latents, over all sites.
    pub fn n_latents(&self) -> usize {
        self.latents.iter().map(BTreeSet::len).sum()
    }
}

/// Which latents of a circuit's sites stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stays {
    /// Those of the circuit.
    Circuit,
    /// The others.
    Rest,
}

impl<M: Metric> Study<'_, M> {
    /// The metric of each conversation with everything pruned but a circuit.
    ///
    /// Each SAE sees what those below it leave: latents of the circuit have the values that they take
    /// then.
    ///
    /// # Errors
    /// If an SAE does not fit its point, or the pass fails.
    ///
    /// # Panics
    /// If the circuit or the means are of another number of sites.
    pub fn measure_circuit(
        &self,
        sites: &[SaeSite<'_>],
        circuit: &Circuit,
        pruned: Pruned<'_>,
        errors: Errors,
    ) -> Result<Vec<f64>, AttributionError> {
        self.measure_part(sites, circuit, Stays::Circuit, pruned, errors)
    }

    /// How faithful and how complete circuits are, of the latents with the largest effects.
    ///
    /// # Errors
    /// If an SAE does not fit its point, or a pass fails.
    ///
    /// # Panics
    /// If the effects or the means are of another number of sites.
    pub fn circuit_shares(
        &self,
        sites: &[SaeSite<'_>],
        effects: &[SiteEffects],
        sizes: &[usize],
        pruned: Pruned<'_>,
        errors: Errors,
    ) -> Result<Vec<CircuitShare>, AttributionError> {
        let sum = |metrics: Vec<f64>| metrics.into_iter().sum::<f64>();
        let nothing = Circuit { latents: vec![BTreeSet::new(); sites.len()] };
        let none = sum(self.measure_circuit(sites, &nothing, pruned, errors)?);
        let whole = sum(self.clean()?) - none;
        let share = |&n_latents: &usize| {
            let circuit = Circuit::largest(effects, n_latents);
            let of = |stays| -> Result<f64, AttributionError> {
                let metrics = self.measure_part(sites, &circuit, stays, pruned, errors)?;
                Ok((sum(metrics) - none) / whole)
            };
            Ok(CircuitShare {
                n_latents: circuit.n_latents(),
                faithfulness: of(Stays::Circuit)?,
                completeness: of(Stays::Rest)?,
            })
        };
        sizes.iter().map(share).collect()
    }

    fn measure_part(
        &self,
        sites: &[SaeSite<'_>],
        circuit: &Circuit,
        stays: Stays,
        pruned: Pruned<'_>,
        errors: Errors,
    ) -> Result<Vec<f64>, AttributionError> {
        assert_eq!(circuit.latents.len(), sites.len(), "latents for each site");
        let mut parts = Vec::with_capacity(sites.len());
        for (nth, site) in sites.iter().enumerate() {
            site.check(self)?;
            let means = match pruned {
                Pruned::Zero => None,
                Pruned::Mean(means) => {
                    assert_eq!(means.len(), sites.len(), "means for each site");
                    Some(&means[nth])
                }
            };
            let mask = self.mask(site.first_position())?;
            let rows = RowEdit::new(site.point, site.sae.config().d_in, 0);
            let part = Part::new(site, &circuit.latents[nth], stays, means, errors, mask);
            parts.push((site.point, rows, part));
        }
        let metrics = self.metric(&mut Parts { parts })?;
        Ok(metrics.into_data().iter().collect())
    }
}

/// One SAE, most of whose latents are pruned.
struct Part<'a> {
    sae: &'a Sae,
    latents: &'a BTreeSet<usize>,
    stays: Stays,
    /// What latents that are pruned leave in their place, `[1, d_in]`.
    instead: Option<Tensor<2>>,
    /// What errors leave in their place, if they are pruned: `[1, d_in]`.
    error: Option<Tensor<2>>,
    /// `[n, 1]`.
    mask: Tensor<2>,
}

impl<'a> Part<'a> {
    fn new(
        site: &SaeSite<'a>,
        latents: &'a BTreeSet<usize>,
        stays: Stays,
        means: Option<&SaeMeans>,
        errors: Errors,
        mask: Tensor<2>,
    ) -> Self {
        let sae = site.sae;
        let (d_sae, device) = (sae.config().d_sae, mask.device());
        let is_pruned = |latent: usize| latents.contains(&latent) != (stays == Stays::Circuit);
        let instead = means.map(|means| {
            let pruned: Vec<f32> = (0..d_sae).map(|latent| f32::from(is_pruned(latent))).collect();
            let pruned = Tensor::<1>::from_data(TensorData::new(pruned, [d_sae]), &device);
            (means.latents.clone() * pruned).unsqueeze::<2>().matmul(sae.directions())
        });
        let error = (errors == Errors::Pruned).then(|| match means {
            Some(means) => means.error.clone().unsqueeze::<2>(),
            None => Tensor::zeros([1, sae.config().d_in], &device),
        });
        Self { sae, latents, stays, instead, error, mask }
    }

    /// # Shapes
    /// `[n, d_in]`, in and out.
    fn prune(&self, x: Tensor<2>) -> Tensor<2> {
        let parts = self.sae.decompose(x.clone());
        let is_pruned = |&latent: &i64| {
            self.latents.contains(&(latent as usize)) != (self.stays == Stays::Circuit)
        };
        let indices = parts.latents.indices.to_data();
        let goes: Vec<f32> = indices.iter::<i64>().map(|l| f32::from(is_pruned(&l))).collect();
        let goes = TensorData::new(goes, parts.latents.indices.dims());
        let goes = parts.latents.values * Tensor::<2>::from_data(goes, &x.device());
        let mut change = -sparse_decode(parts.latents.indices, goes, self.sae.directions());
        if let Some(instead) = &self.instead {
            change = change + instead.clone();
        }
        if let Some(error) = &self.error {
            change = change - parts.error + error.clone();
        }
        x + change * self.mask.clone()
    }
}

/// Hooks of all sites.
struct Parts<'a> {
    parts: Vec<(HookPoint, RowEdit, Part<'a>)>,
}

impl Hook for Parts<'_> {
    fn wants(&self, point: HookPoint) -> bool {
        self.parts.iter().any(|(at, ..)| *at == point)
    }

    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let parts = self.parts.iter_mut().filter(|(at, ..)| *at == point);
        parts.fold(x, |x, (_, rows, part)| rows.apply(x, positions, |x| part.prune(x)))
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.parts.iter_mut().try_for_each(|(_, rows, _)| rows.finish())
    }
}
