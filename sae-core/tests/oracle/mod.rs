//! Losses in f64 by the equations, all of `[n, d_sae]` written out.

use std::collections::BTreeMap;

use sae_core::train::*;

/// Rows of numbers.
type Rows = Vec<Vec<f64>>;
/// For each row and latent.
type Mask = Vec<Vec<bool>>;

#[derive(Clone)]
pub struct Matrix {
    pub shape: [usize; 2],
    pub values: Vec<f64>,
}

impl Matrix {
    fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.shape[1]..][..self.shape[1]]
    }
}

/// Where a loss is looked at.
#[derive(Clone)]
pub struct Point {
    pub parameters: BTreeMap<ParameterName, Matrix>,
    pub x: Matrix,
    pub target: Option<Matrix>,
}

impl Point {
    fn get(&self, name: ParameterName) -> &Matrix {
        &self.parameters[&name]
    }

    fn vector(&self, name: ParameterName) -> &[f64] {
        &self.get(name).values
    }

    fn y(&self) -> &Matrix {
        self.target.as_ref().unwrap_or(&self.x)
    }

    fn n(&self) -> usize {
        self.x.shape[0]
    }

    fn d_sae(&self) -> usize {
        self.get(ParameterName::WDec).shape[0]
    }

    fn norms(&self) -> Vec<f64> {
        let rows = self.get(ParameterName::WDec);
        (0..self.d_sae()).map(|l| dot(rows.row(l), rows.row(l)).sqrt()).collect()
    }

    fn threshold(&self) -> Vec<f64> {
        match self.parameters.get(&ParameterName::Threshold) {
            Some(threshold) => threshold.values.clone(),
            None => self.vector(ParameterName::LogThreshold).iter().map(|t| t.exp()).collect(),
        }
    }

    /// `x − b_dec`, or `x`.
    fn encoded(&self, is_centred: bool) -> Rows {
        let b_dec = self.vector(ParameterName::BDec);
        let rows = (0..self.n()).map(|i| self.x.row(i));
        rows.map(|row| match is_centred {
            true => row.iter().zip(b_dec).map(|(x, b)| x - b).collect(),
            false => row.to_vec(),
        })
        .collect()
    }

    /// Pre-activations without their biases.
    fn projected(&self, is_centred: bool) -> Rows {
        let w_enc = self.get(ParameterName::WEnc);
        let rows = self.encoded(is_centred).into_iter();
        rows.map(|x| (0..self.d_sae()).map(|l| dot(&x, w_enc.row(l))).collect()).collect()
    }

    fn pre(&self, is_centred: bool) -> Rows {
        let b_enc = self.vector(ParameterName::BEnc);
        let mut rows = self.projected(is_centred);
        rows.iter_mut().for_each(|row| row.iter_mut().zip(b_enc).for_each(|(p, b)| *p += b));
        rows
    }

    /// `z · w_dec`.
    fn decoded(&self, z: &Rows) -> Rows {
        let w_dec = self.get(ParameterName::WDec);
        let rows = z.iter().map(|z| {
            let mut row = vec![0.0; w_dec.shape[1]];
            for (l, z) in z.iter().enumerate() {
                row.iter_mut().zip(w_dec.row(l)).for_each(|(sum, w)| *sum += z * w);
            }
            row
        });
        rows.collect()
    }

    /// `z · w_dec + b_dec (+ w_skip · x) − y`.
    fn error(&self, z: &Rows) -> Rows {
        let (b_dec, y) = (self.vector(ParameterName::BDec), self.y());
        let mut rows = self.decoded(z);
        for (i, row) in rows.iter_mut().enumerate() {
            for (d, value) in row.iter_mut().enumerate() {
                *value += b_dec[d] - y.row(i)[d];
                if let Some(w_skip) = self.parameters.get(&ParameterName::WSkip) {
                    *value += dot(w_skip.row(d), self.x.row(i));
                }
            }
        }
        rows
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn square(rows: &Rows) -> f64 {
    rows.iter().map(|row| dot(row, row)).sum()
}

/// `Σ ‖rᵢ − mean r‖²`.
fn variance(rows: &Rows) -> f64 {
    let n = rows.len() as f64;
    let mean = |d: usize| rows.iter().map(|row| row[d]).sum::<f64>() / n;
    let mean: Vec<f64> = (0..rows[0].len()).map(mean).collect();
    let centred = |row: &Vec<f64>| row.iter().zip(&mean).map(|(x, m)| (x - m).powi(2)).sum::<f64>();
    rows.iter().map(centred).sum()
}

fn masked(rows: &Rows, mask: &Mask) -> Rows {
    let row = |(row, mask): (&Vec<f64>, &Vec<bool>)| {
        row.iter().zip(mask).map(|(value, &kept)| if kept { *value } else { 0.0 }).collect()
    };
    rows.iter().zip(mask).map(row).collect()
}

fn map(rows: &Rows, mut f: impl FnMut(usize, usize, f64) -> f64) -> Rows {
    let mut out = rows.clone();
    for (i, row) in out.iter_mut().enumerate() {
        row.iter_mut().enumerate().for_each(|(l, value)| *value = f(i, l, *value));
    }
    out
}

/// How close a decision was.
struct Edge(f64);

impl Edge {
    fn above(&mut self, value: f64, bar: f64) -> bool {
        self.0 = self.0.min((value - bar).abs());
        value > bar
    }

    /// The places of the `k` largest.
    fn largest(&mut self, keys: &[f64], k: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..keys.len()).collect();
        order.sort_by(|&a, &b| keys[b].total_cmp(&keys[a]));
        if let (Some(&last), Some(&next)) = (order.get(k.wrapping_sub(1)), order.get(k)) {
            self.0 = self.0.min(keys[last] - keys[next]);
        }
        order.truncate(k);
        order
    }
}

/// What AuxK holds fixed.
struct AuxPart {
    mask: Mask,
    error: Rows,
    scale: f64,
}

/// What a kind holds fixed around a point.
enum Frozen {
    Standard {
        open: Mask,
    },
    Gated {
        open: Mask,
        grown: Mask,
    },
    Selecting {
        kept: Mask,
        more: Option<Mask>,
        aux: Vec<AuxPart>,
    },
    JumpRelu {
        above: Mask,
        band: Mask,
        band_of_z: Mask,
        dead_below: Mask,
    },
    /// Of each row, latents in the order in which they are picked.
    MatchingPursuit {
        picks: Vec<Vec<usize>>,
    },
}

pub struct Oracle {
    objective: Objective,
    base: Point,
    /// What a squared error is multiplied by.
    scale: f64,
    frozen: Frozen,
    ghost: Option<Ghost>,
    edge: f64,
}

/// What ghost gradients hold fixed.
struct Ghost {
    dead: Vec<usize>,
    /// What the dead are to reconstruct, with the opposite sign.
    error: Rows,
    /// What each row is multiplied by.
    scales: Vec<f64>,
    /// What the sum is multiplied by.
    factor: f64,
}

impl Ghost {
    fn decoded(dead: &[usize], at: &Point, is_centred: bool) -> Rows {
        at.decoded(&map(
            &at.pre(is_centred),
            |_, l, p| if dead.contains(&l) { p.exp() } else { 0.0 },
        ))
    }

    fn squares(&self, at: &Point, is_centred: bool) -> f64 {
        let ghost = Self::decoded(&self.dead, at, is_centred);
        square(&map(&ghost, |i, d, g| self.scales[i] * g + self.error[i][d]))
    }
}

impl Oracle {
    pub fn new(objective: &Objective, base: &Point, dead: &[u32]) -> Self {
        let mut edge = Edge(f64::INFINITY);
        let scale = match objective.error {
            ErrorMeasure::Squared => 1.0 / base.n() as f64,
            ErrorMeasure::Fvu => {
                1.0 / variance(&(0..base.n()).map(|i| base.y().row(i).to_vec()).collect())
            }
        };
        let is_centred = objective.apply_b_dec_to_input;
        let frozen = match &objective.kind {
            Kind::Standard(_) => {
                let open = base.pre(is_centred);
                Frozen::Standard { open: mask(&open, |_, _, p| edge.above(p, 0.0)) }
            }
            Kind::Gated(_) => {
                let open = mask(&base.pre(is_centred), |_, _, p| edge.above(p, 0.0));
                let grown = mask(&magnitudes(base, is_centred), |_, _, m| edge.above(m, 0.0));
                Frozen::Gated { open, grown }
            }
            Kind::Selecting(kind) => selecting(kind, base, is_centred, scale, dead, &mut edge),
            Kind::JumpRelu(kind) => {
                let (pre, threshold) = (base.pre(is_centred), base.threshold());
                let half = kind.bandwidth / 2.0;
                let above = mask(&pre, |_, l, p| edge.above(p, threshold[l]));
                let mut near =
                    |l: usize, value: f64| edge.above(half, (value - threshold[l]).abs());
                let band = mask(&pre, |_, l, p| near(l, p));
                let z = masked(&pre, &above);
                let band_of_z = mask(&z, |_, l, z| near(l, z));
                let is_dead = |l: usize| dead.contains(&(l as u32));
                let dead_below = mask(&pre, |_, l, p| {
                    is_dead(l) && kind.pre_activation.is_some() && p < threshold[l]
                });
                Frozen::JumpRelu { above, band, band_of_z, dead_below }
            }
            Kind::MatchingPursuit(kind) => {
                let rows = base.encoded(is_centred).into_iter();
                let picks = rows.map(|row| pursue(kind, base, row, &mut edge)).collect();
                Frozen::MatchingPursuit { picks }
            }
            other => panic!("no oracle for {other:?}"),
        };
        let (objective, base, edge) = (objective.clone(), base.clone(), edge.0);
        let mut oracle = Self { objective, base, scale, frozen, ghost: None, edge };
        oracle.ghost = oracle.ghost(dead);
        oracle
    }

    fn ghost(&self, dead: &[u32]) -> Option<Ghost> {
        let coefficient = self.objective.ghost_gradients.filter(|_| !dead.is_empty())?.coefficient;
        let (base, is_centred) = (&self.base, self.objective.apply_b_dec_to_input);
        let dead: Vec<usize> = dead.iter().map(|&latent| latent as usize).collect();
        let error = base.error(&self.latents());
        let norm = |row: &Vec<f64>| dot(row, row).sqrt();
        let ghosts = Ghost::decoded(&dead, base, is_centred);
        let scales = error.iter().zip(&ghosts).map(|(e, g)| norm(e) / (2.0 * norm(g))).collect();
        let value = coefficient * self.scale * square(&error);
        let mut ghost = Ghost { dead, error, scales, factor: 1.0 };
        ghost.factor = value / ghost.squares(base, is_centred);
        Some(ghost)
    }

    /// Itself, unless a decision was so close that f32 may take it otherwise.
    pub fn away_from_edges(self, margin: f64) -> Option<Self> {
        (self.edge > margin).then_some(self)
    }

    /// The latents at the point itself.
    pub fn latents(&self) -> Rows {
        let (base, is_centred) = (&self.base, self.objective.apply_b_dec_to_input);
        match &self.frozen {
            Frozen::Standard { open: kept } | Frozen::Selecting { kept, .. } => {
                masked(&base.pre(is_centred), kept)
            }
            Frozen::JumpRelu { above, .. } => masked(&base.pre(is_centred), above),
            Frozen::Gated { open, grown } => {
                masked(&masked(&magnitudes(base, is_centred), grown), open)
            }
            Frozen::MatchingPursuit { picks } => {
                let w_dec = base.get(ParameterName::WDec);
                let rows = base.encoded(is_centred).into_iter().zip(picks);
                rows.map(|(mut row, picks)| {
                    let mut latents = vec![0.0; base.d_sae()];
                    for &pick in picks {
                        latents[pick] += dot(&row, w_dec.row(pick));
                        take_off(&mut row, w_dec.row(pick));
                    }
                    latents
                })
                .collect()
            }
        }
    }

    pub fn loss(&self, at: &Point) -> f64 {
        let is_centred = self.objective.apply_b_dec_to_input;
        let ghost = self.ghost.as_ref();
        let ghost = ghost.map_or(0.0, |ghost| ghost.factor * ghost.squares(at, is_centred));
        ghost + self.loss_of_kind(at)
    }

    fn loss_of_kind(&self, at: &Point) -> f64 {
        let is_centred = self.objective.apply_b_dec_to_input;
        let count = |rows: &Rows| self.scale * square(rows);
        match (&self.objective.kind, &self.frozen) {
            (Kind::Standard(kind), Frozen::Standard { open }) => {
                let z = masked(&at.pre(is_centred), open);
                count(&at.error(&z)) + penalty(&kind.sparsity, at, &z)
            }
            (Kind::Gated(kind), Frozen::Gated { open, grown }) => {
                let gates = masked(&at.pre(is_centred), open);
                let z = masked(&masked(&magnitudes(at, is_centred), grown), open);
                let auxiliary = match kind.auxiliary {
                    GatedAuxiliary::UndetachedDecoder => at.error(&gates),
                    GatedAuxiliary::DetachedDecoder => self.base.error(&gates),
                };
                count(&at.error(&z)) + penalty(&kind.sparsity, at, &gates) + count(&auxiliary)
            }
            (Kind::Selecting(kind), Frozen::Selecting { kept, more, aux }) => {
                let pre = at.pre(is_centred);
                let z = masked(&pre, kept);
                let mut loss = match &kind.selection {
                    Selection::Matryoshka { groups, .. } => {
                        let group = |group: &Group| {
                            let own = map(&z, |_, l, z| if l < group.width { z } else { 0.0 });
                            group.weight * count(&at.error(&own))
                        };
                        groups.iter().map(group).sum()
                    }
                    _ => count(&at.error(&z)),
                };
                if let Some(more) = more {
                    loss += count(&at.error(&masked(&pre, more))) / 8.0;
                }
                for AuxPart { mask, error, scale } in aux {
                    let decoded = at.decoded(&masked(&pre, mask));
                    loss += scale * square(&map(&decoded, |i, d, value| value + error[i][d]));
                }
                loss
            }
            (Kind::JumpRelu(kind), frozen) => self.jump_relu(kind, frozen, at),
            (Kind::MatchingPursuit(_), Frozen::MatchingPursuit { picks }) => {
                let w_dec = at.get(ParameterName::WDec);
                let mut rows = at.encoded(is_centred);
                for (row, picks) in rows.iter_mut().zip(picks) {
                    for &pick in picks {
                        take_off(row, w_dec.row(pick));
                    }
                }
                count(&rows)
            }
            _ => unreachable!("frozen for this kind"),
        }
    }

    fn jump_relu(&self, kind: &JumpRelu, frozen: &Frozen, at: &Point) -> f64 {
        let Frozen::JumpRelu { above, band, band_of_z, dead_below } = frozen else {
            unreachable!("frozen for this kind")
        };
        let is_centred = self.objective.apply_b_dec_to_input;
        let (pre, threshold, norms) = (at.pre(is_centred), at.threshold(), at.norms());
        let (pre_0, threshold_0) = (self.base.pre(is_centred), self.base.threshold());
        let to_input = f64::from(kind.straight_through == StraightThrough::ThresholdAndInput);
        // How far the entry moved against its threshold, as far as the estimators see it.
        let moved = |i: usize, l: usize, p: f64| {
            (threshold_0[l] - threshold[l] + to_input * (p - pre_0[i][l])) / kind.bandwidth
        };
        let z = map(&pre, |i, l, p| {
            let through = if band[i][l] { threshold_0[l] * moved(i, l, p) } else { 0.0 };
            through + if above[i][l] { p } else { 0.0 }
        });
        let open = map(&pre, |i, l, p| {
            let slope = match kind.l0 {
                L0Loss::BatchQuadratic { .. } if band_of_z[i][l] => {
                    (threshold_0[l] - threshold[l]) / kind.bandwidth
                }
                L0Loss::BatchQuadratic { .. } => 0.0,
                _ if band[i][l] => moved(i, l, p),
                _ => 0.0,
            };
            slope + f64::from(above[i][l])
        });
        let n = at.n() as f64;
        let counts = open.iter().map(|row| row.iter().sum::<f64>());
        let count = match kind.l0 {
            L0Loss::Step => counts.sum::<f64>() / n,
            L0Loss::Quadratic { target } => {
                counts.map(|l0| 2.0 / target * (l0 - target).powi(2)).sum::<f64>() / n
            }
            L0Loss::BatchQuadratic { target } => (counts.sum::<f64>() / n / target - 1.0).powi(2),
            L0Loss::Tanh { scale } => {
                let squashed = map(&z, |_, l, z| (scale * z * norms[l]).tanh());
                squashed.iter().flatten().sum::<f64>() / n
            }
            other => panic!("{other:?}"),
        };
        let gaps = masked(&map(&pre, |_, l, p| (threshold[l] - p) * norms[l]), dead_below);
        self.scale * square(&at.error(&z))
            + kind.l0_coefficient * count
            + kind.pre_activation.unwrap_or(0.0) * gaps.iter().flatten().sum::<f64>() / n
    }
}

fn mask(rows: &Rows, mut holds: impl FnMut(usize, usize, f64) -> bool) -> Mask {
    let mut out = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        out.push(row.iter().enumerate().map(|(l, &value)| holds(i, l, value)).collect());
    }
    out
}

fn magnitudes(at: &Point, is_centred: bool) -> Rows {
    let (r_mag, b_mag) = (at.vector(ParameterName::RMag), at.vector(ParameterName::BMag));
    map(&at.projected(is_centred), |_, l, projected| projected * r_mag[l].exp() + b_mag[l])
}

fn penalty(sparsity: &Sparsity, at: &Point, z: &Rows) -> f64 {
    let norms = at.norms();
    let weighted = map(z, |_, l, z| match sparsity.weighted_by_decoder_norms {
        true => z * norms[l],
        false => z,
    });
    let power = |row: &Vec<f64>, p: f64| -> f64 {
        row.iter().filter(|z| **z != 0.0).map(|z| z.powf(p)).sum()
    };
    let row = |row: &Vec<f64>| match sparsity.norm {
        SparsityNorm::LpToTheP { p } => power(row, p),
        SparsityNorm::Lp { p } => match power(row, p) {
            0.0 => 0.0,
            sum => sum.powf(1.0 / p),
        },
    };
    sparsity.coefficient * weighted.iter().map(row).sum::<f64>() / at.n() as f64
}

fn selecting(
    kind: &Selecting,
    base: &Point,
    is_centred: bool,
    error_scale: f64,
    dead: &[u32],
    edge: &mut Edge,
) -> Frozen {
    let (pre, d_sae, n) = (base.pre(is_centred), base.d_sae(), base.n());
    let scale = match kind.rescale_by_decoder_norm {
        true => base.norms(),
        false => vec![1.0; d_sae],
    };
    let by_magnitude = matches!(kind.selection, Selection::AbsTopK { .. });
    let ranked = map(&pre, |_, l, p| match by_magnitude {
        true => (p * scale[l]).abs(),
        false => p * scale[l],
    });
    let positive =
        |mask: Mask, edge: &mut Edge| mask_and(&mask, &pre, |p| by_magnitude || edge.above(p, 0.0));
    let by_row = |k: usize, edge: &mut Edge| -> Mask {
        let rows = ranked.iter().map(|row| places(&edge.largest(row, k), d_sae)).collect();
        positive(rows, edge)
    };
    let kept = match kind.selection {
        Selection::TopK { k } | Selection::MultiTopK { k } | Selection::AbsTopK { k } => {
            by_row(k, edge)
        }
        Selection::GroupMax { k } => {
            let size = d_sae / k;
            let best = |row: &Vec<f64>, group: usize, edge: &mut Edge| {
                group * size + edge.largest(&row[group * size..][..size], 1)[0]
            };
            let row = |row| -> Vec<usize> { (0..k).map(|group| best(row, group, edge)).collect() };
            let picked: Vec<Vec<usize>> = pre.iter().map(row).collect();
            positive(picked.iter().map(|picked| places(picked, d_sae)).collect(), edge)
        }
        Selection::BatchTopK { k } | Selection::Matryoshka { k, .. } => {
            let n_kept = ((k * n as f64) as usize).clamp(1, n * d_sae);
            let all = edge.largest(&ranked.concat(), n_kept);
            let flat = places(&all, n * d_sae);
            positive(flat.chunks(d_sae).map(<[bool]>::to_vec).collect(), edge)
        }
        _ => panic!("{:?}", kind.selection),
    };
    let more = match kind.selection {
        Selection::MultiTopK { k } => Some(by_row((4 * k).min(d_sae), edge)),
        _ => None,
    };
    let z = masked(&pre, &kept);
    let parts: Vec<(std::ops::Range<usize>, Rows)> = match &kind.selection {
        Selection::Matryoshka { groups, aux_k_target: AuxKTarget::OwnResidual, .. } => {
            let starts = std::iter::once(0).chain(groups.iter().map(|group| group.width));
            let part = |(start, group): (usize, &Group)| {
                let own = map(&z, |_, l, z| if l < group.width { z } else { 0.0 });
                (start..group.width, base.error(&own))
            };
            starts.zip(groups).map(part).collect()
        }
        _ => vec![(0..d_sae, base.error(&z))],
    };
    let mut aux = Vec::new();
    for (range, error) in parts {
        let dead: Vec<usize> =
            dead.iter().map(|&l| l as usize).filter(|l| range.contains(l)).collect();
        let Some(aux_k) = kind.aux_k.filter(|_| !dead.is_empty()) else { continue };
        let k = aux_k.k.unwrap_or(error[0].len() / 2).max(1);
        let few = (dead.len() as f64 / k as f64).min(1.0);
        let scale = match (aux_k.rule, n) {
            (AuxKRule::OpenAi, 1) => continue,
            (AuxKRule::OpenAi, _) => aux_k.coefficient / variance(&error),
            _ => aux_k.coefficient * few * error_scale,
        };
        let row = |row: &Vec<f64>| -> Vec<bool> {
            let keys: Vec<f64> = dead.iter().map(|&l| row[l]).collect();
            let largest = edge.largest(&keys, k.min(dead.len()));
            places(&largest.iter().map(|&at| dead[at]).collect::<Vec<_>>(), d_sae)
        };
        let mask: Mask = ranked.iter().map(row).collect();
        let mask = match aux_k.rule {
            AuxKRule::SaeLens => mask,
            _ => mask_and(&mask, &pre, |p| by_magnitude || edge.above(p, 0.0)),
        };
        aux.push(AuxPart { mask, error, scale });
    }
    Frozen::Selecting { kept, more, aux }
}

fn places(picked: &[usize], n: usize) -> Vec<bool> {
    (0..n).map(|at| picked.contains(&at)).collect()
}

fn mask_and(picked: &Mask, rows: &Rows, mut holds: impl FnMut(f64) -> bool) -> Mask {
    mask(rows, |i, l, value| picked[i][l] && holds(value))
}

fn take_off(row: &mut [f64], direction: &[f64]) {
    let size = dot(row, direction);
    row.iter_mut().zip(direction).for_each(|(r, w)| *r -= size * w);
}

fn pursue(kind: &MatchingPursuit, base: &Point, mut row: Vec<f64>, edge: &mut Edge) -> Vec<usize> {
    let (w_dec, mut picks) = (base.get(ParameterName::WDec), Vec::new());
    for _ in 0..kind.max_iterations.unwrap_or(row.len()) {
        let dots: Vec<f64> = (0..base.d_sae()).map(|l| dot(&row, w_dec.row(l))).collect();
        let best = edge.largest(&dots, 1)[0];
        let is_positive = edge.above(dots[best], 0.0);
        let is_new = is_positive && !picks.contains(&best);
        if is_positive {
            take_off(&mut row, w_dec.row(best));
            picks.push(best);
        }
        let is_small = !edge.above(dot(&row, &row).sqrt(), kind.residual_threshold);
        if is_small || (kind.stop_on_duplicate_support && !is_new) {
            break;
        }
    }
    picks
}
