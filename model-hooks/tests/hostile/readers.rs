//! Every reader of foreign bytes, and what is done with what it gives. The tests beside this file
//! and the targets in `fuzz/` all read through here.

use std::fmt::Display;
use std::io::Cursor;
use std::path::Path;

use model_hooks::ModelConfig;
use model_hooks::load::{Checkpoint, Gguf, LoadError, Safetensors, ShardIndex, TensorSource};
use model_hooks::text::{ChatTemplate, Message, Role, Tokenizer};

/// A reader of one kind of file.
pub struct Reader {
    /// The folder of its seeds, and the name of its fuzz target.
    pub name: &'static str,
    /// Reads the bytes of a file: what then uses the result, or the refusal.
    pub read: fn(&[u8]) -> Result<Use, String>,
}

/// Does with the result of a reader what a program would do next.
pub type Use = Box<dyn FnOnce()>;

/// All readers.
pub const READERS: [Reader; 8] = [
    Reader { name: "gguf", read: gguf },
    Reader { name: "safetensors", read: safetensors },
    Reader { name: "shard_index", read: shard_index },
    Reader { name: "config", read: config },
    Reader { name: "generation_config", read: generation_config },
    Reader { name: "tokenizer", read: tokenizer },
    Reader { name: "tokenizer_config", read: tokenizer_config },
    Reader { name: "chat_template", read: chat_template },
];

const PATH: &str = "hostile.file";

/// A refusal has to name the file.
fn load_refusal(error: LoadError) -> String {
    let message = error.to_string();
    assert!(message.contains(PATH), "{message}");
    message
}

/// The reader was given no path.
fn refusal(error: impl Display) -> String {
    error.to_string()
}

fn gguf(bytes: &[u8]) -> Result<Use, String> {
    let open = || Gguf::read(Cursor::new(bytes.to_vec()), Path::new(PATH));
    let mut gguf = open().map_err(load_refusal)?;
    let names: Vec<String> = gguf.names().map(ToOwned::to_owned).collect();
    for name in names {
        gguf.tensor(&name).map_err(load_refusal)?;
    }
    // A file that is no language model is a good one all the same.
    if gguf.metadata().get("tokenizer.ggml.model").is_none() {
        return Ok(Box::new(|| ()));
    }
    let mut checkpoint = Checkpoint::from_gguf(gguf).map_err(load_refusal)?;
    for name in checkpoint.tensors.names() {
        checkpoint.tensors.tensor(&name).map_err(load_refusal)?;
    }
    Ok(Box::new(move || {
        checkpoint.tokenizer.iter().for_each(use_tokenizer);
        checkpoint.chat_template.iter().for_each(use_template);
    }))
}

fn safetensors(bytes: &[u8]) -> Result<Use, String> {
    let mut file = Safetensors::read(Cursor::new(bytes), Path::new(PATH)).map_err(load_refusal)?;
    for name in file.names() {
        match file.tensor(&name) {
            // One of a dtype that no model has is refused only by itself.
            Err(LoadError::TensorEncoding { .. }) | Ok(_) => (),
            Err(error) => return Err(load_refusal(error)),
        }
    }
    Ok(Box::new(|| ()))
}

fn shard_index(bytes: &[u8]) -> Result<Use, String> {
    let index = ShardIndex::from_json(bytes, Path::new(PATH)).map_err(load_refusal)?;
    for shard in index.shards() {
        let path = Path::new("folder").join(shard);
        assert_eq!(path.parent(), Some(Path::new("folder")), "{shard:?} leaves the folder");
    }
    Ok(Box::new(|| ()))
}

fn config(bytes: &[u8]) -> Result<Use, String> {
    ModelConfig::from_hf(bytes, None).map_err(refusal)?;
    Ok(Box::new(|| ()))
}

fn generation_config(bytes: &[u8]) -> Result<Use, String> {
    let config = br#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
        "vocab_size": 9, "num_attention_heads": 2, "num_hidden_layers": 1,
        "max_position_embeddings": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu"}"#;
    ModelConfig::from_hf(config, Some(bytes)).map_err(refusal)?;
    Ok(Box::new(|| ()))
}

fn tokenizer(bytes: &[u8]) -> Result<Use, String> {
    let tokenizer = Tokenizer::from_json(bytes).map_err(refusal)?;
    Ok(Box::new(move || use_tokenizer(&tokenizer)))
}

fn use_tokenizer(tokenizer: &Tokenizer) {
    // Words, digits, runs of spaces, a special token, and characters of two to four bytes.
    let text = " ab  Hello, 12345\n\n<s>éß-漢字 😀 don't 'a  ";
    for text in ["", " ", "a", text] {
        if let Ok(token_ids) = tokenizer.encode(text) {
            let _ = tokenizer.decode(&token_ids);
            let _ = tokenizer.decode_plain(&token_ids);
        }
    }
    let n_vocab = u32::try_from(tokenizer.n_vocab()).unwrap_or(u32::MAX);
    for token_id in (0..n_vocab.min(64)).chain([n_vocab, u32::MAX]) {
        let _ = tokenizer.token(token_id);
        let _ = tokenizer.decode(&[token_id, token_id]);
    }
}

fn tokenizer_config(bytes: &[u8]) -> Result<Use, String> {
    let template = ChatTemplate::from_hf(Some(bytes), None).map_err(refusal)?;
    Ok(Box::new(move || template.iter().for_each(use_template)))
}

fn chat_template(bytes: &[u8]) -> Result<Use, String> {
    let template = ChatTemplate::from_hf(None, Some(bytes)).map_err(refusal)?;
    Ok(Box::new(move || template.iter().for_each(use_template)))
}

fn use_template(template: &ChatTemplate) {
    let conversation = [
        Message::new(Role::System, "Be brief."),
        Message::new(Role::User, " Hi\u{0} {{ 1 }} "),
        Message::new(Role::Assistant, "Hello</s>"),
    ];
    for n_messages in 0..=conversation.len() {
        let _ = template.render(&conversation[..n_messages], true);
    }
}
