//! What the user can say beside talking.

use anyhow::{Context, Result, anyhow, bail};

/// A line of the conversation.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Something to answer.
    Say(String),
    /// `/steer`: the plan, or the clamps, come back on; `/steer PATH`: this plan, in place of what
    /// was before.
    Steer(Option<String>),
    /// `/off`: they stay away.
    Off,
    /// `/when PATH`: only answers to requests for which this probe fires; `/when`: all of them.
    When(Option<String>),
    /// `/clamp 1234=8,99=-2`: these latents are set to these values, in place of what was before.
    Clamp(Vec<(usize, f32)>),
    /// `/watch 1234`: this latent is shown at every token; `/watch` shows none.
    Watch(Option<usize>),
    /// `/save PATH`: what steers is written as a plan.
    Save(String),
    /// `/new`: the conversation begins anew.
    New,
    /// `/help`.
    Help,
    /// `/quit`.
    Quit,
}

/// What `/help` says.
pub const HELP: &str = "\
/steer PATH         steer by a plan; /steer alone goes on by the last plan or clamps
/off                do not steer
/when PATH          steer only answers to requests for which a probe fires; /when alone steers all
/clamp 1234=8,9=0   clamp latents to values, in place of the plan
/watch 1234         show a latent at every token, as the model makes it before it is steered;
                    /watch alone shows none
/save PATH          write what steers as a plan
/new                begin a new conversation
/quit               end";

impl Command {
    /// Reads a line; one that is empty says nothing.
    ///
    /// # Errors
    /// If it begins with a slash and is no command.
    pub fn parse(line: &str) -> Result<Option<Self>> {
        let line = line.trim();
        if line.is_empty() {
            return Ok(None);
        }
        let Some(command) = line.strip_prefix('/') else {
            return Ok(Some(Self::Say(line.to_owned())));
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        let alone = |command: Self| match rest {
            "" => Ok(command),
            _ => Err(anyhow!("/{name} takes nothing, and got {rest:?}")),
        };
        Ok(Some(match name {
            "steer" => Self::Steer((!rest.is_empty()).then(|| rest.to_owned())),
            "when" => Self::When((!rest.is_empty()).then(|| rest.to_owned())),
            "off" => alone(Self::Off)?,
            "new" => alone(Self::New)?,
            "help" => alone(Self::Help)?,
            "quit" => alone(Self::Quit)?,
            "clamp" => Self::Clamp(clamps(rest)?),
            "watch" if rest.is_empty() => Self::Watch(None),
            "watch" => Self::Watch(Some(latent(rest)?)),
            "save" if rest.is_empty() => bail!("/save takes a path, such as /save plan.json"),
            "save" => Self::Save(rest.to_owned()),
            _ => bail!("there is no command /{name}; /help lists those there are"),
        }))
    }
}

fn clamps(text: &str) -> Result<Vec<(usize, f32)>> {
    let clamp = |part: &str| {
        let (left, right) = part.split_once('=').ok_or_else(|| {
            anyhow!("/clamp takes LATENT=VALUE, such as 1234=8, and got {part:?}")
        })?;
        let value: f32 = right.trim().parse().with_context(|| {
            format!("/clamp takes LATENT=VALUE, such as 1234=8, and got the value {right:?}")
        })?;
        Ok((latent(left)?, value))
    };
    text.split(',').map(clamp).collect()
}

fn latent(text: &str) -> Result<usize> {
    let text = text.trim();
    text.parse().with_context(|| format!("{text:?} is not the number of a latent"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_said() {
        use Command::*;
        for (line, expected) in [
            (" Hello there. ", Some(Say("Hello there.".into()))),
            ("  ", None),
            ("/steer", Some(Steer(None))),
            ("/steer  a plan.json ", Some(Steer(Some("a plan.json".into())))),
            ("/off ", Some(Off)),
            ("/clamp 1234=8", Some(Clamp(vec![(1234, 8.0)]))),
            ("/clamp 1 = -2.5 , 7=1e1", Some(Clamp(vec![(1, -2.5), (7, 10.0)]))),
            ("/watch 12", Some(Watch(Some(12)))),
            ("/watch", Some(Watch(None))),
            ("/save a plan.json", Some(Save("a plan.json".into()))),
            ("/new", Some(New)),
            ("/help", Some(Help)),
            ("/quit", Some(Quit)),
        ] {
            assert_eq!(Command::parse(line).unwrap(), expected, "{line}");
        }
    }

    #[test]
    fn what_is_no_command_says_why() {
        for line in
            ["/stear", "/off now", "/clamp", "/clamp 3", "/clamp 3=x", "/clamp -3=1", "/save", "/"]
        {
            assert!(Command::parse(line).is_err(), "{line}");
        }
    }
}
