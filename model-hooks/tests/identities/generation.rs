//! Caches, shared prefixes and batches change nothing; draws of a row depend on itself alone.

use super::*;

#[test]
fn steps_and_shared_prefixes_are_one_pass() {
    for (name, model) in models() {
        let ids = ROWS[0];
        let whole = floats(model.last_logits(&batch(&model, &[ids]), &mut ()).unwrap());
        for n_prefix in 0..ids.len() {
            let prefix = match n_prefix {
                0 => SharedPrefix::default(),
                n => model.prefix(&ids[..n], &mut ()).unwrap(),
            };
            // The rest token by token.
            let n_layers = model.config().n_layers;
            let mut cache = model.cache(prefix, &batch(&model, &[&ids[n_prefix..]]));
            let mut last = None;
            for id in &ids[n_prefix..] {
                let tokens = batch(&model, &[[*id]]);
                let positions = cache.next_positions(1);
                let residual = model.embed(&tokens, &positions, &mut ());
                let residual = model.blocks(residual, 0..n_layers, &mut cache, &mut ()).unwrap();
                last = Some(model.unembed_last(residual, &positions, &mut ()));
            }
            assert_close(name, &floats(last.unwrap()), &whole, 2e-5);
        }
    }
}

/// Greedy ids after each row, every token by a pass over the whole conversation.
fn uncached(model: &LanguageModel, rows: &[Vec<u32>], config: &GenerateConfig) -> Vec<Vec<u32>> {
    let row = |row: &Vec<u32>| {
        let mut ids = row.clone();
        while ids.len() < row.len() + config.max_new_tokens {
            let logits = floats(model.last_logits(&batch(model, &[&ids]), &mut ()).unwrap());
            let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
            ids.push(best.unwrap().0 as u32);
            if config.stop_ids.contains(ids.last().unwrap()) {
                break;
            }
        }
        ids[row.len()..].to_vec()
    };
    rows.iter().map(row).collect()
}

#[test]
fn generation_is_uncached_generation_whatever_the_batch_and_the_prefix() {
    for (name, model) in models() {
        let shared = [11, 60, 2];
        let config = GenerateConfig::greedy(9, vec![93, 6]);
        let joined: Vec<Vec<u32>> = ROWS.iter().map(|row| [&shared, *row].concat()).collect();
        let expected = uncached(&model, &joined, &config);
        let prefix = model.prefix(&shared, &mut ()).unwrap();
        let behind = model.generate(&ROWS, &prefix, &config, &mut (), unobserved).unwrap();
        assert_eq!(behind, expected, "{name}");
        let none = SharedPrefix::default();
        let alone = model.generate(&joined, &none, &config, &mut (), unobserved).unwrap();
        assert_eq!(alone, expected, "{name}");
    }
}

/// Long enough that each block's buffer grows more than once, and rows leave on the way.
#[test]
fn long_answers_outgrow_the_room_of_the_cache() {
    let (name, model) = models().find(|(_, m)| m.config().n_ctx > 120).expect("one");
    let none = SharedPrefix::default();
    let mut config = GenerateConfig::greedy(110, Vec::new());
    let rows: Vec<Vec<u32>> = ROWS.iter().map(|row| row.to_vec()).collect();
    let expected = uncached(&model, &rows, &config);
    let mut ends = expected.iter().enumerate().map(|(row, answer)| answer[40 + 30 * row]);
    for stop_ids in [Vec::new(), ends.by_ref().take(2).collect()] {
        config.stop_ids = stop_ids;
        let expected = expected.iter().map(|answer| {
            let end = answer.iter().position(|id| config.stop_ids.contains(id));
            answer[..end.map_or(answer.len(), |end| end + 1)].to_vec()
        });
        let expected: Vec<_> = expected.collect();
        let cached = model.generate(&rows, &none, &config, &mut (), unobserved).unwrap();
        assert_eq!(cached, expected, "{name}");
    }
}

/// Every row by itself switches to LongRoPE's long factors where it grows past 20 tokens, shared
/// prefix or not, and what was cached is run again.
#[test]
fn longrope_switches_where_each_conversation_grows_too_long() {
    let model = named("phi3_partial_longrope_switch");
    let config = GenerateConfig::greedy(16, vec![]);
    let shared: Vec<u32> = (30..40).collect();
    let joined: Vec<Vec<u32>> = ROWS.iter().map(|row| [&shared, *row].concat()).collect();
    let expected = uncached(&model, &joined, &config);
    let prefix = model.prefix(&shared, &mut ()).unwrap();
    let behind = model.generate(&ROWS, &prefix, &config, &mut (), unobserved).unwrap();
    assert_eq!(behind, expected);

    // Step by step, the switch is an error: the caller has what must be run again.
    let mut cache = model.cache(prefix.clone(), &batch(&model, &ROWS[..1]));
    let run = |ids: &[u32], cache: &mut KvCache| {
        let tokens = batch(&model, &[ids]);
        let residual = model.embed(&tokens, &cache.next_positions(ids.len()), &mut ());
        model.blocks(residual, 0..3, cache, &mut ()).map(drop)
    };
    run(&[1; 10], &mut cache).unwrap();
    assert_eq!(run(&[1], &mut cache), Err(ForwardError::RopeSwitch { length: 20 }));

    // So it is for any text of a packed row.
    let texts: [&[u32]; 2] = [&[1; 12], &[2; 3]];
    let mut config = HarvestConfig::new(HookPoint::resid_post(0), 64);
    config.layout = Layout::Packed { row_tokens: 20 };
    let harvested = model.harvest(&texts, &prefix, &config, |_| ControlFlow::Continue(()));
    assert_eq!(harvested, Err(ForwardError::RopeSwitch { length: 20 }));
}

/// Continuations of several lengths, some of one token, behind prompts run once: each has the
/// log-probability that a pass over the whole text gives it.
#[test]
fn continuations_are_as_likely_as_in_the_whole_text() {
    let continuations: [&[Vec<u32>]; 3] = [
        &[vec![4], vec![9, 8, 7], vec![90, 2]],
        &[vec![50; 16], vec![6]],
        &[vec![3, 3], vec![61, 5, 1, 44, 12, 12, 80]],
    ];
    let texts: Vec<Continued<'_>> = ROWS
        .iter()
        .zip(continuations)
        .map(|(prompt, continuations)| Continued { prompt, continuations })
        .collect();
    let switching = "phi3_partial_longrope_switch";
    for (name, model) in models().chain([(switching, named(switching))]) {
        let log_prob = |prompt: &[u32], ids: &Vec<u32>| {
            let terms = (0..ids.len()).map(|n| {
                let before = [prompt, &ids[..n]].concat();
                let logits = floats(model.last_logits(&batch(&model, &[before]), &mut ()).unwrap());
                let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
                f64::from(logits[ids[n] as usize]) - sum.ln()
            });
            terms.sum::<f64>() as f32
        };
        let expected: Vec<f32> = texts
            .iter()
            .flat_map(|text| text.continuations.iter().map(|ids| log_prob(text.prompt, ids)))
            .collect();
        for batch_tokens in [1, 14, 100] {
            let found = model.continuation_log_probs(&texts, batch_tokens, &()).unwrap();
            let found: Vec<f32> = found.into_iter().flatten().map(|x| x as f32).collect();
            assert_close(name, &found, &expected, 1e-4);
        }
    }
    let model = model();
    let unknown = Continued { prompt: ROWS[0], continuations: &[vec![1, 1_000_000]] };
    let refused = model.continuation_log_probs(&[unknown], 100, &()).unwrap_err();
    assert!(matches!(refused, ForwardError::Tokens(TokenError::UnknownId { row: 0, .. })));
    let long = Continued { prompt: ROWS[0], continuations: &[vec![1; 1_000_000]] };
    let refused = model.continuation_log_probs(&[long], 100, &()).unwrap_err();
    assert!(matches!(refused, ForwardError::Tokens(TokenError::TooLong { row: 0, .. })));
}

#[test]
fn draws_of_a_row_depend_on_no_other_row() {
    let model = model();
    let random = RandomSampling { top_p: Some(0.95), ..RandomSampling::new(1.2, 5) };
    let config =
        GenerateConfig { sampling: Sampling::Random(random), ..GenerateConfig::greedy(8, vec![]) };
    let none = SharedPrefix::default();
    let run = |rows: &[&[u32]], end: usize| {
        let observe = |new: NewToken<'_>| match new.row == 0 && new.answer.len() == end {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        model.generate(rows, &none, &config, &mut (), observe).unwrap()
    };
    let whole = run(&ROWS, 8);
    assert_eq!(run(&ROWS, 8), whole);
    // A row that ends early, or is longer, leaves the draws of the others alone.
    let cut = run(&ROWS, 3);
    assert_eq!((&cut[0][..], &cut[1..]), (&whole[0][..3], &whole[1..]));
    assert_eq!(run(&[&[9; 12], ROWS[1], ROWS[2]], 8)[1..], whole[1..]);
    let greedy =
        model.generate(&ROWS, &none, &GenerateConfig::greedy(8, vec![]), &mut (), unobserved);
    assert_ne!(greedy.unwrap(), whole);
}
