//! Conversations as token ids.

use anyhow::{Context, Result, ensure};
use model_hooks::text::{ChatTemplate, Message, Role, Tokenizer};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use steering::{Request, TokenQuestion};

use super::During;
use super::options::Scale;
use crate::assets::{Dialogue, LoadedModel};
use crate::corpus::{Training, Turn};
use crate::requests::last_request;
use crate::sets::questions::Question;

/// Longer dialogues are cut here: long ones would crowd out the variety of short ones.
const MAX_DIALOGUE_TOKENS: usize = 192;
/// Dialogues kept for measuring, out of training's sight.
const N_HELD_OUT: usize = 64;

/// Lays out conversations as the model was trained to read them.
pub(super) struct Chats<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    /// Ids that end an answer.
    pub(super) stop_ids: Vec<u32>,
}

/// A conversation that ends with an answer.
pub(super) struct Answered {
    /// Token ids.
    pub(super) ids: Vec<u32>,
    /// Position of the first token of the answer.
    pub(super) answer_start: usize,
}

/// What the autoencoder is trained and measured on. All of them begin with the same tokens.
pub(super) struct Corpus {
    pub(super) training: Vec<Vec<u32>>,
    /// What the dialogues of the training part begin with.
    pub(super) openings: Vec<String>,
    pub(super) held_out: Vec<Vec<u32>>,
    /// Dialogues that nothing is learnt from, the held-out ones first, for as many tokens as
    /// perplexities are to be measured on.
    pub(super) unseen: Vec<Dialogued>,
}

/// A dialogue in tokens.
pub(super) struct Dialogued {
    pub(super) ids: Vec<u32>,
    /// How many of them stand before the first answer.
    pub(super) n_prompt: usize,
    /// The position at which the first words begin.
    pub(super) start: usize,
}

impl Corpus {
    pub(super) fn n_training_tokens(&self) -> usize {
        self.training.iter().map(Vec::len).sum()
    }
}

impl<'a> Chats<'a> {
    pub(super) fn new(loaded: &'a LoadedModel) -> Self {
        let stop_ids = loaded.model.config().special_tokens.eos.clone();
        Self { tokenizer: &loaded.tokenizer, template: &loaded.template, stop_ids }
    }

    fn encode(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
        let text = self.template.render(messages, add_generation_prompt);
        let text = text.during("laying out a conversation")?;
        self.tokenizer.encode(&text).during("turning a conversation into tokens")
    }

    /// A conversation that ends with a request, up to where the answer begins.
    pub(super) fn conversation(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.encode(messages, true)
    }

    /// The request that a conversation ends with.
    pub(super) fn request(&self, messages: &[Message]) -> Result<Request> {
        last_request(self.tokenizer, self.template, messages)
    }

    /// A request after some answered ones, up to where the answer begins.
    pub(super) fn prompt(&self, shots: &[Turn], prompt: &str) -> Result<Vec<u32>> {
        ensure!(!prompt.trim().is_empty(), "a prompt is empty: at least one word is needed");
        self.conversation(&asked(shots, prompt))
    }

    /// A request, and each of some answers to it by itself.
    pub(super) fn question(&self, question: &Question) -> Result<TokenQuestion> {
        let prompt = self.prompt(&[], &question.question)?;
        let text = self.template.render(&asked(&[], &question.question), true);
        let text = text.during("laying out a question")?;
        let choice = |choice: &String| {
            let ids = self.tokenizer.encode(&format!("{text}{}", choice.trim()));
            let ids = ids.during("turning an answer into tokens")?;
            let answer = ids.strip_prefix(prompt.as_slice()).filter(|answer| !answer.is_empty());
            answer.map(<[u32]>::to_vec).with_context(|| {
                format!("the tokens of the answer {choice:?} run into those of its question")
            })
        };
        let choices = question.choices.iter().map(choice).collect::<Result<_>>()?;
        Ok(TokenQuestion { prompt, choices })
    }

    /// A request with its answer.
    pub(super) fn answered(&self, turn: &Turn) -> Result<Answered> {
        let ids = self.encode(&messages(std::slice::from_ref(turn)), false)?;
        let prompt = self.prompt(&[], &turn.prompt)?;
        ensure!(
            ids.starts_with(&prompt),
            "the chat template lays out a request differently once it is answered"
        );
        Ok(Answered { ids, answer_start: prompt.len() })
    }

    /// What the model said, without the tokens that end it.
    pub(super) fn text(&self, ids: &[u32]) -> Result<String> {
        let text = self.tokenizer.decode_plain(ids).during("turning tokens into text")?;
        Ok(text.trim().to_owned())
    }

    /// The text of one token.
    pub(super) fn token(&self, id: u32) -> String {
        self.tokenizer.token(id).unwrap_or_default()
    }

    /// A dialogue, and how many of its tokens stand before the first answer.
    fn dialogue(&self, dialogue: &Dialogue) -> Result<Dialogued> {
        let roles = [Role::User, Role::Assistant].into_iter().cycle();
        let said = dialogue.turns.iter().zip(roles).filter(|(turn, _)| !turn.is_empty());
        let messages: Vec<Message> =
            said.map(|(turn, role)| Message::new(role, turn.clone())).collect();
        let mut ids = self.encode(&messages, false)?;
        ids.truncate(MAX_DIALOGUE_TOKENS);
        let first = self.request(&messages[..messages.len().min(1)])?;
        let n_prompt = first.ids.iter().zip(&ids).take_while(|(a, b)| a == b).count().max(1);
        Ok(Dialogued { ids, n_prompt, start: first.start })
    }

    /// Dialogues, and the authors' refusals and compliances, as many as the scale asks for.
    pub(super) fn training_texts(
        &self,
        dialogues: &[Dialogue],
        training: &Training,
        scale: &Scale,
        seed: u64,
    ) -> Result<Corpus> {
        let mut texts = self.turns(training, scale.training.n_tokens)?;
        let mut n_tokens: usize = texts.iter().map(Vec::len).sum();
        let mut order: Vec<usize> = (0..dialogues.len()).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let mut rest = order.into_iter().map(|index| &dialogues[index]);
        let n_held_out = N_HELD_OUT.min(dialogues.len().div_ceil(10));
        let mut unseen = rest
            .by_ref()
            .take(n_held_out)
            .map(|dialogue| self.dialogue(dialogue))
            .collect::<Result<Vec<_>>>()?;
        let held_out: Vec<Vec<u32>> = unseen.iter().map(|dialogue| dialogue.ids.clone()).collect();
        let mut openings = Vec::new();
        while n_tokens < scale.training.n_tokens
            && let Some(dialogue) = rest.next()
        {
            let Dialogued { ids, .. } = self.dialogue(dialogue)?;
            n_tokens += ids.len();
            texts.push(ids);
            openings.extend(dialogue.turns.first().filter(|turn| !turn.is_empty()).cloned());
        }
        // The first token of a text is not predicted.
        let n_predicted = |dialogue: &Dialogued| dialogue.ids.len().saturating_sub(1);
        let mut n_unseen: usize = unseen.iter().map(n_predicted).sum();
        while n_unseen < scale.n_perplexity_tokens
            && let Some(dialogue) = rest.next()
        {
            unseen.push(self.dialogue(dialogue)?);
            n_unseen += unseen.last().map_or(0, n_predicted);
        }
        ensure!(
            !held_out.is_empty() && !texts.is_empty(),
            "too little text to train on and to hold some out: pass more with --text"
        );
        Ok(Corpus { training: texts, openings, held_out, unseen })
    }

    /// Refused and answered requests, at most a third of the tokens. Each unsafe request comes with
    /// its own refusal first, then with those of others, so that refusing is seen in many words.
    fn turns(&self, training: &Training, n_tokens: usize) -> Result<Vec<Vec<u32>>> {
        let n = training.refusals.len();
        let shifted = |shift: usize| {
            (0..n).map(move |i| (&training.refusals[i], &training.refusals[(i + shift) % n]))
        };
        // Shifts that share no factor with each other, so that pairs do not repeat.
        let refusals = [0, 7, 31, 53, 83, 101].into_iter().flat_map(shifted);
        let refusals = refusals.map(|(asked, answered)| Turn {
            prompt: asked.prompt.clone(),
            answer: answered.answer.clone(),
        });
        let turns = training.compliances.iter().cloned().chain(refusals);
        let (mut texts, mut spent) = (Vec::new(), 0);
        for turn in turns {
            let ids = self.answered(&turn)?.ids;
            spent += ids.len();
            if 3 * spent > n_tokens {
                break;
            }
            texts.push(ids);
        }
        Ok(texts)
    }
}

/// The messages of a request after some answered ones.
pub(super) fn asked(shots: &[Turn], prompt: &str) -> Vec<Message> {
    let mut messages = messages(shots);
    messages.push(Message::new(Role::User, prompt));
    messages
}

fn messages(turns: &[Turn]) -> Vec<Message> {
    let pair = |turn: &Turn| {
        [Message::new(Role::User, &turn.prompt), Message::new(Role::Assistant, &turn.answer)]
    };
    turns.iter().flat_map(pair).collect()
}

/// How many tokens all of them begin with; at least one token of each is left after those.
pub(super) fn common_prefix(rows: &[Vec<u32>]) -> usize {
    let Some(first) = rows.first() else { return 0 };
    let shortest = rows.iter().map(Vec::len).min().unwrap_or(0);
    let agree = |&column: &usize| rows.iter().all(|row| row[column] == first[column]);
    (0..shortest.saturating_sub(1)).take_while(agree).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_common_prefix_leaves_a_token_of_each() {
        assert_eq!(common_prefix(&[vec![1, 2, 3], vec![1, 2, 4, 5]]), 2);
        assert_eq!(common_prefix(&[vec![1, 2], vec![1, 2]]), 1);
        assert_eq!(common_prefix(&[vec![1], vec![1, 2]]), 0);
        assert_eq!(common_prefix(&[]), 0);
    }
}
