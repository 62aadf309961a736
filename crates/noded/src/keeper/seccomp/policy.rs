//! The policy language: text in, [`Policy`] out.
//!
//! The head of `policy/standard.policy` says how it reads. Parsing is strict, because a policy that was
//! misread is a hole: an unknown call or name, a name defined for nothing, a call named twice, a comparison
//! that cannot hold are errors with their line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::table::SYSCALLS;

/// Why a policy text is not a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyError {
    /// Counts from 1; 0 when it is about the text as a whole.
    pub line: usize,
    /// What is wrong, in small letters, with the word that is.
    pub message: String,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seccomp policy, line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for PolicyError {}

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// The kernel does it.
    Allow,
    /// The caller gets this errno and the kernel does nothing.
    Errno(u16),
}

/// How much of an argument's register the kernel looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// The low half only; whatever stands in the high half must not change the answer.
    Low32,
    /// All of it.
    Full64,
}

/// `(argument & mask) in values`, or its opposite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// 0 to 5.
    pub argument: u8,
    /// With [`Width::Low32`], `mask` and `values` fit in 32 bits.
    pub width: Width,
    /// Bits that count; all of the width when the policy names no mask.
    pub mask: u64,
    /// Never empty, and each lies within the mask.
    pub values: BTreeSet<u64>,
    /// Holds when the argument is *not* among the values.
    pub negated: bool,
}

/// An action and what must hold for it; no condition always holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clause {
    /// What happens when every condition holds.
    pub action: Action,
    /// All of them must hold.
    pub conditions: Vec<Condition>,
}

/// What the policy says about one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Whatever the arguments.
    Always(Action),
    /// The first clause that holds wins; the last has no condition.
    ByArguments(Vec<Clause>),
}

/// A parsed policy, for every architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// For every call that is not in `calls`.
    pub default: Action,
    /// By the kernel's name of the call.
    pub calls: BTreeMap<String, Verdict>,
}

impl Policy {
    /// Reads a policy text.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let mut parser = Parser::default();
        for (index, line) in text.lines().enumerate() {
            parser.line = index + 1;
            let code = line.split('#').next().unwrap_or_default();
            let words = tokenize(code).map_err(|message| parser.error(message))?;
            if words.is_empty() {
                continue;
            }
            let mut words = Words { rest: &words };
            if code.starts_with([' ', '\t']) { parser.clause(&mut words) } else { parser.statement(&mut words) }
                .and_then(|()| words.end())
                .map_err(|message| parser.error(message))?;
        }
        parser.finish()
    }
}

/// A `call` whose clauses are being read.
struct OpenCall {
    name: String,
    arguments: Vec<(String, Width)>,
    clauses: Vec<Clause>,
}

impl OpenCall {
    fn is_complete(&self) -> bool {
        self.clauses.last().is_some_and(|clause| clause.conditions.is_empty())
    }
}

struct Constant {
    value: u64,
    line: usize,
    used: bool,
}

#[derive(Default)]
struct Parser {
    line: usize,
    default: Option<Action>,
    constants: BTreeMap<String, Constant>,
    calls: BTreeMap<String, Verdict>,
    open: Option<OpenCall>,
}

impl Parser {
    fn error(&self, message: String) -> PolicyError {
        PolicyError { line: self.line, message }
    }

    fn finish(mut self) -> Result<Policy, PolicyError> {
        self.close_call().map_err(|message| self.error(message))?;
        if let Some((name, constant)) = self.constants.iter().find(|(_, constant)| !constant.used) {
            return Err(PolicyError { line: constant.line, message: format!("const {name} is used nowhere") });
        }
        let default = self.default.ok_or_else(|| PolicyError { line: 0, message: "there is no default".to_owned() })?;
        Ok(Policy { default, calls: self.calls })
    }

    fn statement(&mut self, words: &mut Words<'_>) -> Result<(), String> {
        self.close_call()?;
        match words.next()? {
            "default" => {
                if self.default.is_some() {
                    return Err("there is a default already".to_owned());
                }
                self.default = Some(self.errno(words.next()?)?);
                Ok(())
            }
            "const" => self.constant(words),
            "allow" => self.names(words, Action::Allow),
            "deny" => {
                let action = self.errno(words.next()?)?;
                self.names(words, action)
            }
            "call" => self.call(words),
            other => Err(format!("'{other}' begins no statement")),
        }
    }

    fn constant(&mut self, words: &mut Words<'_>) -> Result<(), String> {
        let name = words.name()?.to_owned();
        words.expect("=")?;
        let mut value = self.value(words.next()?)?;
        while words.accept("|") {
            value |= self.value(words.next()?)?;
        }
        let constant = Constant { value, line: self.line, used: false };
        match self.constants.insert(name.clone(), constant) {
            None => Ok(()),
            Some(_) => Err(format!("const {name} is defined already")),
        }
    }

    fn names(&mut self, words: &mut Words<'_>, action: Action) -> Result<(), String> {
        self.record(words.name()?, Verdict::Always(action))?;
        while !words.rest.is_empty() {
            self.record(words.name()?, Verdict::Always(action))?;
        }
        Ok(())
    }

    fn call(&mut self, words: &mut Words<'_>) -> Result<(), String> {
        let name = words.name()?.to_owned();
        words.expect("(")?;
        let mut arguments: Vec<(String, Width)> = Vec::new();
        loop {
            let argument = words.name()?;
            let mut width = Width::Full64;
            if argument != "_" {
                if arguments.iter().any(|(other, _)| other == argument) {
                    return Err(format!("two arguments are called '{argument}'"));
                }
                words.expect(":")?;
                width = match words.next()? {
                    "u32" => Width::Low32,
                    "u64" => Width::Full64,
                    other => return Err(format!("'{other}' is neither u32 nor u64")),
                };
            }
            arguments.push((argument.to_owned(), width));
            if words.accept(")") {
                break;
            }
            words.expect(",")?;
        }
        if arguments.len() > 6 {
            return Err("a call has at most six arguments".to_owned());
        }
        self.open = Some(OpenCall { name, arguments, clauses: Vec::new() });
        Ok(())
    }

    fn clause(&mut self, words: &mut Words<'_>) -> Result<(), String> {
        let Some(mut call) = self.open.take() else {
            return Err("an indented line belongs under a call".to_owned());
        };
        if call.is_complete() {
            return Err(format!("nothing of {} reaches this line", call.name));
        }
        let action = match words.next()? {
            "allow" => Action::Allow,
            errno => self.errno(errno)?,
        };
        let mut conditions = Vec::new();
        if words.accept("if") {
            conditions.push(self.condition(&call, words)?);
            while words.accept("and") {
                conditions.push(self.condition(&call, words)?);
            }
        }
        call.clauses.push(Clause { action, conditions });
        self.open = Some(call);
        Ok(())
    }

    fn condition(&mut self, call: &OpenCall, words: &mut Words<'_>) -> Result<Condition, String> {
        let name = words.name()?;
        let (argument, width) = call
            .arguments
            .iter()
            .zip(0_u8..)
            .find_map(|((other, width), index)| (other == name && name != "_").then_some((index, *width)))
            .ok_or_else(|| format!("{} has no argument '{name}'", call.name))?;
        let all = match width {
            Width::Low32 => u64::from(u32::MAX),
            Width::Full64 => u64::MAX,
        };
        let mut mask = all;
        if words.accept("&") {
            let inverted = words.accept("~");
            mask = self.value(words.next()?)?;
            if mask & !all != 0 {
                return Err(format!("the mask {mask:#x} is wider than '{name}'"));
            }
            if inverted {
                mask = !mask & all;
            }
        }
        let (negated, set) = match words.next()? {
            "==" => (false, false),
            "!=" => (true, false),
            "in" => (false, true),
            "not" => {
                words.expect("in")?;
                (true, true)
            }
            other => return Err(format!("'{other}' compares nothing")),
        };
        let mut values = BTreeSet::new();
        if set {
            words.expect("{")?;
        }
        loop {
            let word = words.next()?;
            let value = self.value(word)?;
            if value & !mask != 0 {
                return Err(format!("'{name}' can never be '{word}'"));
            }
            if !values.insert(value) {
                return Err(format!("'{word}' stands there twice"));
            }
            if !set || words.accept("}") {
                break;
            }
        }
        Ok(Condition { argument, width, mask, values, negated })
    }

    fn close_call(&mut self) -> Result<(), String> {
        match self.open.take() {
            None => Ok(()),
            Some(call) if call.is_complete() => self.record(&call.name, Verdict::ByArguments(call.clauses)),
            Some(call) => Err(format!("the last line of {} must have no condition", call.name)),
        }
    }

    fn record(&mut self, name: &str, verdict: Verdict) -> Result<(), String> {
        if SYSCALLS.binary_search_by_key(&name, |(known, ..)| known).is_err() {
            return Err(format!("no architecture has a call '{name}'"));
        }
        match self.calls.insert(name.to_owned(), verdict) {
            None => Ok(()),
            Some(_) => Err(format!("{name} was dealt with already")),
        }
    }

    fn errno(&mut self, word: &str) -> Result<Action, String> {
        match self.value(word)? {
            errno @ 1..=4095 => Ok(Action::Errno(errno as u16)),
            other => Err(format!("{other} is not an errno")),
        }
    }

    fn value(&mut self, word: &str) -> Result<u64, String> {
        if word.starts_with(|first: char| first.is_ascii_digit()) {
            let number = match word.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16),
                None => word.parse(),
            };
            return number.map_err(|_| format!("'{word}' is not a number"));
        }
        let constant = self.constants.get_mut(word).ok_or_else(|| format!("nothing is called '{word}'"))?;
        constant.used = true;
        Ok(constant.value)
    }
}

/// The words of a line that are still to be read.
struct Words<'a> {
    rest: &'a [&'a str],
}

impl<'a> Words<'a> {
    fn next(&mut self) -> Result<&'a str, String> {
        let (first, rest) = self.rest.split_first().ok_or("the line ends too early")?;
        self.rest = rest;
        Ok(first)
    }

    fn name(&mut self) -> Result<&'a str, String> {
        let word = self.next()?;
        if word.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_') {
            Ok(word)
        } else {
            Err(format!("'{word}' is not a name"))
        }
    }

    fn accept(&mut self, word: &str) -> bool {
        match self.rest.split_first() {
            Some((first, rest)) if *first == word => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    fn expect(&mut self, word: &str) -> Result<(), String> {
        match self.next()? {
            found if found == word => Ok(()),
            found => Err(format!("'{found}' stands where '{word}' should")),
        }
    }

    fn end(&self) -> Result<(), String> {
        self.rest.first().map_or(Ok(()), |word| Err(format!("'{word}' is too much")))
    }
}

/// Splits a line into names, numbers and signs.
fn tokenize(line: &str) -> Result<Vec<&str>, String> {
    let mut words = Vec::new();
    let mut rest = line.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = if first.is_ascii_alphanumeric() || first == '_' {
            rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len())
        } else if rest.starts_with("==") || rest.starts_with("!=") {
            2
        } else if "(){}:,&~|=".contains(first) {
            1
        } else {
            return Err(format!("'{first}' means nothing here"));
        };
        let (word, after) = rest.split_at(length);
        words.push(word);
        rest = after.trim_start();
    }
    Ok(words)
}
