//! Several dumps at the same time, of which only the owned rules stay in memory.

use std::rc::Rc;

use anyhow::{Context, Result};

use super::process::{Crashed, Finished, Process, Sink, drain_all};
use super::{PendingRead, Query, System};
use crate::netfilter::Name;
use crate::netfilter::dump::DumpReader;
use crate::netfilter::ruleset::Ruleset;

/// Attempts at an `iptables-save` that crashes.
const SAVES: u32 = 3;

/// Several dumps that were started at the same time.
pub(super) struct Saves<'a> {
    host: &'a System,
    name: &'a Name,
    pending: Vec<Save>,
}

/// A dump for a query.
struct Save {
    query: Query,
    dump: Result<Dump>,
}

/// The source of a dump.
pub(super) enum Dump {
    /// No table exists, so the dump is known to be empty.
    Nothing,
    /// It was read earlier in the session.
    Kept(Rc<[u8]>),
    /// An `iptables-save` prints it.
    Started {
        process: Box<Process>,
        /// The number of the rules before, by which the dump can be kept.
        generation: Option<u32>,
    },
}

impl<'a> Saves<'a> {
    /// Starts the dumps, or takes those that were kept.
    pub fn begin(host: &'a System, name: &'a Name, queries: Vec<Query>) -> Self {
        let start = |query| Save {
            query,
            dump: host.dump(query),
        };
        Self {
            host,
            name,
            pending: queries.into_iter().map(start).collect(),
        }
    }
}

impl PendingRead for Saves<'_> {
    fn is_ready(&self) -> bool {
        self.pending.iter().all(|save| match &save.dump {
            Ok(Dump::Started { process, .. }) => process.has_printed(),
            Ok(Dump::Nothing | Dump::Kept(_)) | Err(_) => true,
        })
    }

    fn finish(self: Box<Self>) -> Vec<Result<Ruleset>> {
        let Self {
            host,
            name,
            pending,
        } = *self;
        let complete = |(query, ruleset)| {
            let read = retry_crashed(host, name, query, ruleset);
            let mut found =
                read.with_context(|| format!("reading the {} rules", query.family.title()))?;
            let hidden = host.hidden(query, &found);
            found.unreadable.extend(hidden);
            Ok(found)
        };
        let dumps = pending.iter().map(|save| (save.query, save.is_dump()));
        let dumps: Vec<_> = dumps.collect();
        let rulesets = read_all(host, name, pending).into_iter();
        dumps
            .into_iter()
            .zip(rulesets)
            .map(|((query, is_dump), ruleset)| match is_dump {
                true => complete((query, ruleset)),
                false => ruleset,
            })
            .collect()
    }
}

impl Save {
    fn is_dump(&self) -> bool {
        !matches!(self.dump, Ok(Dump::Nothing))
    }
}

/// Until 1.8.4 iptables-nft-save crashes when rules change meanwhile.
fn retry_crashed(
    host: &System,
    name: &Name,
    query: Query,
    mut ruleset: Result<Ruleset>,
) -> Result<Ruleset> {
    for _ in 1..SAVES {
        if !ruleset.as_ref().is_err_and(anyhow::Error::is::<Crashed>) {
            break;
        }
        let dump = host.dump(query);
        let again = read_all(host, name, vec![Save { query, dump }]);
        ruleset = again.into_iter().next().unwrap_or(ruleset);
    }
    ruleset
}

/// A dump that is read, and its text where that is kept.
struct Reading<'a> {
    reader: DumpReader<'a>,
    text: Vec<u8>,
    generation: Option<u32>,
}

impl Reading<'_> {
    fn feed(&mut self, piece: &[u8]) {
        self.reader.feed(piece);
        if self.generation.is_some() {
            self.text.extend_from_slice(piece);
        }
    }
}

/// Drains all dumps at the same time. The error of a program comes before that
/// of its dump, which is mostly its consequence.
fn read_all(host: &System, name: &Name, saves: Vec<Save>) -> Vec<Result<Ruleset>> {
    let reading = |_| Reading {
        reader: DumpReader::new(name),
        text: Vec::new(),
        generation: None,
    };
    let mut readings: Vec<Reading> = saves.iter().map(reading).collect();
    let queries: Vec<Query> = saves.iter().map(|save| save.query).collect();
    let mut errors = Vec::new();
    let mut running = Vec::new();
    for (at, save) in saves.into_iter().enumerate() {
        match save.dump {
            Ok(Dump::Started {
                process,
                generation,
            }) => {
                readings[at].generation = generation;
                running.push((at, process));
            }
            Ok(Dump::Kept(text)) => readings[at].reader.feed(&text),
            Ok(Dump::Nothing) => {}
            Err(error) => errors.push((at, error)),
        }
    }
    let places: Vec<usize> = running.iter().map(|(at, _)| *at).collect();
    let mut sinks: Vec<_> = readings
        .iter_mut()
        .enumerate()
        .filter(|(at, _)| places.contains(at))
        .map(|(_, reading)| move |piece: &[u8]| reading.feed(piece))
        .collect();
    let running = running.into_iter().zip(&mut sinks);
    let finished = drain_all(running.map(|((_, process), sink)| (*process, sink as Sink)));
    for (at, finished) in places.into_iter().zip(finished) {
        if let Err(error) = finished.and_then(Finished::success) {
            errors.push((at, error));
        }
    }
    let failed: Vec<usize> = errors.iter().map(|(at, _)| *at).collect();
    let complete = |((at, reading), query): ((usize, Reading), Query)| {
        let ruleset = reading.reader.finish()?;
        let dumps = host.dumps.as_ref().filter(|_| !failed.contains(&at));
        if let (Some(dumps), Some(generation)) = (dumps, reading.generation) {
            dumps.keep(query, generation, reading.text);
        }
        Ok(ruleset)
    };
    let readings = readings.into_iter().enumerate().zip(queries);
    let mut rulesets: Vec<Result<Ruleset>> = readings.map(complete).collect();
    for (at, error) in errors {
        rulesets[at] = Err(error);
    }
    rulesets
}
