//! Lays out a conversation as the model was trained to read it.

use std::{io, thread};

use minijinja::{Environment, Error, ErrorKind};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};

use super::TextError;
use crate::load::Metadata;

/// Bytes of a template. gpt-oss, whose is among the longest, has 17 thousand.
const MAX_TEMPLATE_BYTES: usize = 1 << 16;
/// The stack for a template. minijinja goes one call deeper for every minus sign before a number,
/// and for every operator of a chain: a call and more for each byte, a few hundred bytes each.
const STACK_BYTES: usize = MAX_TEMPLATE_BYTES << 11;
/// Instructions that one rendering may take: templates are foreign, and need some hundreds for
/// each message.
const MAX_STEPS: u64 = 10_000_000;
/// Bytes that one rendering may write.
const MAX_OUTPUT: usize = 1 << 26;
/// Calls within calls.
const MAX_DEPTH: usize = 100;

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions that come before the conversation.
    System,
    /// The human.
    User,
    /// The model.
    Assistant,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// A model's chat template: Jinja, as `transformers` runs it (its blocks trimmed, Python's string
/// methods, `raise_exception`).
///
/// A rendering is bounded in steps, in depth and in what it writes, though not in memory: a template
/// can double a text in a variable over and over, and minijinja has no limit for that. `tojson`, which only the
/// templates of tools use, is left out, because its order of keys and its escapes are not Python's.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl ChatTemplate {
    /// Parses a template; the two tokens are what it may write at the ends of a text.
    ///
    /// # Errors
    /// [`TextError::TemplateSyntax`] if it is no Jinja, [`TextError::TemplateTooLong`].
    pub fn new(
        source: String,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, TextError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            let (limit, actual) = (MAX_TEMPLATE_BYTES, source.len());
            return Err(TextError::TemplateTooLong { limit, actual });
        }
        // Compiled at every rendering, since a compiled template cannot own its text.
        on_large_stack(|| environment().template_from_str(&source).map(drop))
            .map_err(|source| TextError::TemplateSyntax { source })?;
        Ok(Self { source, bos_token, eos_token })
    }

    /// The template of a GGUF file (`tokenizer.chat_template`), if it has one.
    ///
    /// # Errors
    /// [`TextError`] if the template is no Jinja, or a key is of another type than it should be.
    pub fn from_gguf(metadata: &Metadata) -> Result<Option<Self>, TextError> {
        let Some(source) = metadata.optional("tokenizer.chat_template", Metadata::string)? else {
            return Ok(None);
        };
        let tokens = metadata.strings("tokenizer.ggml.tokens")?;
        let token = |key| -> Result<Option<String>, TextError> {
            let id = metadata.optional(key, Metadata::u32)?;
            let token = |token_id: u32| match tokens.get(token_id as usize) {
                Some(&token) => Ok(token.to_owned()),
                None => Err(TextError::UnknownToken { token_id }),
            };
            id.map(token).transpose()
        };
        let bos_token = token("tokenizer.ggml.bos_token_id")?;
        let eos_token = token("tokenizer.ggml.eos_token_id")?;
        Self::new(source.to_owned(), bos_token, eos_token).map(Some)
    }

    /// The template of a Hugging Face folder: the text of `chat_template.jinja` if there is that
    /// file, otherwise the one in `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`TextError`] if a file is not what it should be, or there are several templates and none
    /// is the default.
    pub fn from_hf(
        tokenizer_config: Option<&[u8]>,
        jinja: Option<&[u8]>,
    ) -> Result<Option<Self>, TextError> {
        let config: TokenizerConfig = match tokenizer_config {
            Some(json) => serde_json::from_slice(json)
                .map_err(|source| TextError::TokenizerConfigJson { source })?,
            None => TokenizerConfig::default(),
        };
        let source = match (jinja, config.chat_template) {
            (Some(jinja), _) => str::from_utf8(jinja)
                .map_err(|source| TextError::TemplateUtf8 { source })?
                .to_owned(),
            (None, None) => return Ok(None),
            (None, Some(Templates::One(source))) => source,
            (None, Some(Templates::Many(templates))) => {
                let actual = templates.iter().map(|template| template.name.clone()).collect();
                match templates.into_iter().find(|template| template.name == "default") {
                    Some(default) => default.template,
                    None => return Err(TextError::NoDefaultTemplate { actual }),
                }
            }
        };
        let text = |token: Option<Token>| token.map(Token::into_text);
        Self::new(source, text(config.bos_token), text(config.eos_token)).map(Some)
    }

    /// The text of a conversation; with `add_generation_prompt`, opened for the assistant's turn.
    ///
    /// # Errors
    /// [`TextError::TemplateRender`] if the template refuses the conversation (many demand that
    /// turns alternate), or runs past its bounds.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let context = Context {
            messages,
            add_generation_prompt,
            bos_token: self.bos_token.as_deref(),
            eos_token: self.eos_token.as_deref(),
        };
        on_large_stack(|| {
            let mut output = Bounded(Vec::new());
            environment()
                .template_from_str(&self.source)?
                .render_captured_to(context, &mut output)?;
            String::from_utf8(output.0)
                .map_err(|error| Error::new(ErrorKind::BadEscape, "not UTF-8").with_source(error))
        })
        .map_err(|source| TextError::TemplateRender { source })
    }
}

/// Runs `f` where even the deepest template of [`MAX_TEMPLATE_BYTES`] does not overflow the stack.
fn on_large_stack<T: Send>(f: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    thread::scope(|scope| {
        let spawned = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, f);
        let thread = spawned.map_err(|error| {
            Error::new(ErrorKind::InvalidOperation, "no stack for the template").with_source(error)
        })?;
        // It panics on some templates, as on `[][::-1]`.
        let panicked = || Error::new(ErrorKind::InvalidOperation, "minijinja panics on it");
        thread.join().unwrap_or_else(|_| Err(panicked()))
    })
}

/// The environment that `transformers` renders in.
fn environment<'source>() -> Environment<'source> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(MAX_STEPS));
    environment.set_recursion_limit(MAX_DEPTH);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.remove_filter("tojson");
    environment
}

#[derive(Serialize)]
struct Context<'a> {
    messages: &'a [Message],
    add_generation_prompt: bool,
    // Left out rather than null: `transformers` leaves undefined what a tokenizer does not have.
    #[serde(skip_serializing_if = "Option::is_none")]
    bos_token: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    eos_token: Option<&'a str>,
}

/// A writer that refuses to grow past [`MAX_OUTPUT`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other("the chat template writes without end"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What matters here of `tokenizer_config.json`.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Many(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// Older files describe a token where newer ones write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Described { content: String },
}

impl Token {
    fn into_text(self) -> String {
        match self {
            Self::Text(content) | Self::Described { content } => content,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String, TextError> {
        let tokens = (Some("<s>".to_owned()), Some("</s>".to_owned()));
        ChatTemplate::new(source.to_owned(), tokens.0, tokens.1)?.render(messages, true)
    }

    fn conversation() -> [Message; 2] {
        [Message::new(Role::User, " Hi "), Message::new(Role::Assistant, "Hello")]
    }

    #[test]
    fn renders_as_transformers_does() {
        // The lines of blocks leave no blank lines, and Python's methods work.
        let source = "\
{{ bos_token }}
  {% for message in messages %}
{{ message['role'] + ': ' + message.content.strip() + eos_token }}
  {% endfor %}
{% if add_generation_prompt %}
assistant:
{%- endif %}
";
        let expected = "<s>\nuser: Hi</s>\nassistant: Hello</s>\nassistant:";
        assert_eq!(render(source, &conversation()).unwrap(), expected);
    }

    #[test]
    fn a_template_may_refuse() {
        let source =
            "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}";
        let Err(TextError::TemplateRender { source }) = render(source, &conversation()) else {
            panic!("the template should refuse");
        };
        assert_eq!(source.detail(), Some("no system"));
    }

    #[test]
    fn a_template_may_not_run_wild() {
        for source in [
            "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}",
            "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
            "{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
            "{{ messages | tojson }}",
            "{{ undefined.attribute }}",
            "{% include 'other' %}",
        ] {
            let rendered = render(source, &conversation());
            assert!(matches!(rendered, Err(TextError::TemplateRender { .. })), "{source}");
        }
        let parsed = render("{% for %}", &[]);
        assert!(matches!(parsed, Err(TextError::TemplateSyntax { .. })));
    }

    #[test]
    fn what_minijinja_panics_on_is_an_error() {
        // Panics as of minijinja 2.24.
        let rendered = render("{% for message in messages[::-1] %}{% endfor %}", &[]);
        assert!(matches!(rendered, Ok(_) | Err(TextError::TemplateRender { .. })));
    }

    #[test]
    fn a_template_of_any_depth_is_refused_or_parsed() {
        let minus = |n_bytes| format!("{{{{ {}1 }}}}", "-".repeat(n_bytes));
        assert!(render(&minus(65_000), &[]).is_ok());
        let error = render(&minus(66_000), &[]).unwrap_err();
        assert!(matches!(error, TextError::TemplateTooLong { .. }), "{error}");
    }

    #[test]
    fn finds_the_template_of_a_folder() {
        let one = br#"{"chat_template": "{{ bos_token }}1", "bos_token": {"content": "<s>"}}"#;
        let many = br#"{"chat_template": [{"name": "rag", "template": "r"},
            {"name": "default", "template": "{{ eos_token }}2"}], "eos_token": "</s>"}"#;
        let read = |config: &[u8], jinja: Option<&[u8]>| {
            ChatTemplate::from_hf(Some(config), jinja).unwrap().unwrap().render(&[], false).unwrap()
        };
        assert_eq!(read(one, None), "<s>1");
        assert_eq!(read(many, None), "</s>2");
        assert_eq!(read(one, Some(b"{{ bos_token }}3")), "<s>3");
        assert!(ChatTemplate::from_hf(Some(b"{}"), None).unwrap().is_none());
        assert!(ChatTemplate::from_hf(None, None).unwrap().is_none());

        let unnamed = br#"{"chat_template": [{"name": "rag", "template": "r"}]}"#;
        let error = ChatTemplate::from_hf(Some(unnamed), None).unwrap_err();
        assert!(matches!(error, TextError::NoDefaultTemplate { .. }), "{error}");
        assert!(ChatTemplate::from_hf(None, Some(b"\xff")).is_err());
        assert!(ChatTemplate::from_hf(Some(b"[]"), None).is_err());
    }
}
