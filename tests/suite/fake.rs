//! A host that is two models, and that can be told to fail.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Mutex;

use anyhow::{Result, bail};
use iptables_balance::host::{
    Facts, Host, Lock, PendingRead, PendingSave, Query, Questions, ReplyFilter, Scope,
};
use iptables_balance::netfilter::ruleset::Ruleset;
use iptables_balance::netfilter::{ConntrackEntry, Family, Name, Table, Variant};

use crate::model::Model;

/// The fault of a restore.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Refuses.
    Refuse,
    /// Says that it did it, and did nothing.
    Lie,
    /// Does it, and says that it failed.
    Deny,
    /// Does the first table, and fails at the second.
    Half,
    /// Does it, and damages a chain of the other family.
    Spoil,
}

pub struct Fake {
    pub ipv4: Mutex<Model>,
    pub ipv6: Mutex<Model>,
    /// By the number of the restore, from 0.
    pub faults: Vec<(usize, Fault)>,
    pub restores: Mutex<usize>,
    /// The families that are forwarded.
    pub forwarding: Mutex<BTreeSet<Family>>,
    pub files: Mutex<BTreeMap<PathBuf, Vec<u8>>>,
    pub connections: Mutex<Vec<(Family, ConntrackEntry)>>,
    /// The part that fails or lies: `forwarding`, `store`, `connections` or
    /// `end`.
    pub broken: Option<(&'static str, Broken)>,
}

/// The way in which a part beside the rules is broken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Broken {
    /// It says so.
    Fails,
    /// It says that it was done, and it was not.
    Lies,
}

impl Fake {
    pub fn new(ipv4: Model, ipv6: Model) -> Self {
        Self {
            ipv4: ipv4.into(),
            ipv6: ipv6.into(),
            faults: Vec::new(),
            restores: 0.into(),
            forwarding: BTreeSet::from(Family::BOTH).into(),
            files: Mutex::default(),
            connections: Mutex::default(),
            broken: None,
        }
    }

    /// Returns true if the part works.
    fn works(&self, what: &str) -> Result<bool> {
        match self.broken {
            Some((broken, Broken::Fails)) if broken == what => bail!("{what} is broken"),
            Some((broken, Broken::Lies)) => Ok(broken != what),
            _ => Ok(true),
        }
    }

    pub fn model(&self, family: Family) -> &Mutex<Model> {
        match family {
            Family::Ipv4 => &self.ipv4,
            Family::Ipv6 => &self.ipv6,
        }
    }

    fn read(&self, name: &Name, query: Query) -> Result<Ruleset> {
        let dump = self.model(query.family).lock().unwrap().save();
        let plain = |line: &str| {
            let rule = line.split_once("] ").map_or(line, |(_, rule)| rule);
            rule.to_owned() + "\n"
        };
        let dump = match query.counters {
            true => dump,
            false => dump.lines().map(plain).collect(),
        };
        let mut found = Ruleset::read(dump.as_bytes(), name)?;
        if let Scope::Only(wanted) = query.scope {
            found.tables.retain(|table, _| *table == wanted);
        }
        Ok(found)
    }

    pub fn dump(&self) -> String {
        Family::BOTH
            .map(|family| self.model(family).lock().unwrap().save())
            .concat()
    }
}

impl Host for Fake {
    fn variant(&self) -> Variant {
        Variant::Nft
    }

    fn supports(&self, _: Family) -> bool {
        true
    }

    fn lock(&self) -> anyhow::Result<Rc<Lock>> {
        Ok(Rc::new(Lock::none()))
    }

    fn generation(&self) -> Option<u32> {
        None
    }

    /// The dump is of the moment at which the reading begins.
    fn begin_read<'a>(&'a self, name: &'a Name, queries: Vec<Query>) -> Box<dyn PendingRead + 'a> {
        let read = |query| self.read(name, query);
        Box::new(Ready(queries.into_iter().map(read).collect()))
    }

    fn begin_save<'a>(&'a self, family: Family) -> Result<Box<dyn PendingSave + 'a>> {
        let dump = self.model(family).lock().unwrap().save();
        Ok(Box::new(Saved(dump.into_bytes())))
    }

    fn restore(
        &self,
        family: Family,
        transaction: &[u8],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<()> {
        meanwhile();
        let number = std::mem::replace(&mut *self.restores.lock().unwrap(), 0);
        *self.restores.lock().unwrap() = number + 1;
        let fault = self
            .faults
            .iter()
            .find(|(at, _)| *at == number)
            .map(|(_, fault)| *fault);
        if fault == Some(Fault::Refuse) {
            bail!("refused");
        }
        if fault == Some(Fault::Lie) {
            return Ok(());
        }
        let mut text = String::from_utf8(transaction.to_vec())?;
        if fault == Some(Fault::Half) {
            let end = text.find("COMMIT\n").expect("a table") + "COMMIT\n".len();
            text.truncate(end);
        }
        self.model(family)
            .lock()
            .unwrap()
            .restore(&text)
            .map_err(|why| anyhow::anyhow!("{why}\n{text}"))?;
        match fault {
            Some(Fault::Deny | Fault::Half) => bail!("denied"),
            Some(Fault::Spoil) => {
                let spoiled = "*nat\n:W - [0:0]\nCOMMIT\n";
                self.model(family)
                    .lock()
                    .unwrap()
                    .restore(spoiled)
                    .map_err(anyhow::Error::msg)
            }
            _ => Ok(()),
        }
    }

    fn delete_jumps(&self, family: Family, table: Table, name: &Name) -> Result<()> {
        let mut model = self.model(family).lock().unwrap();
        let dump = model.save();
        let lines = dump
            .lines()
            .map(|line| line.split_once("] ").map_or(line, |(_, rule)| rule));
        let lines = lines
            .skip_while(|line| *line != format!("*{}", table.as_str()))
            .take_while(|line| *line != "COMMIT");
        let mut numbers = BTreeMap::<&str, usize>::new();
        let mut deletions = Vec::new();
        for line in lines.filter(|line| line.starts_with("-A ")) {
            let words: Vec<&str> = line.split(' ').collect();
            let number = numbers.entry(words[1]).or_default();
            *number += 1;
            let has_match = words
                .windows(2)
                .any(|two| two == ["-m", "recent"] || two == ["-m", "connlimit"]);
            if has_match && !name.owns(words[1]) && name.owns(words.last().unwrap()) {
                deletions.push(format!("-D {} {number}\n", words[1]));
            }
        }
        deletions.reverse();
        let text = format!("*{}\n{}COMMIT\n", table.as_str(), deletions.concat());
        model.restore(&text).map_err(anyhow::Error::msg)
    }

    fn other_variant_in_use(&self) -> bool {
        false
    }

    fn hides_source_nat(&self) -> bool {
        false
    }

    fn facts(&self, _: &Questions) -> Facts {
        Facts::default()
    }

    fn forwarding(&self, family: Family) -> Option<bool> {
        Some(self.forwarding.lock().unwrap().contains(&family))
    }

    fn set_forwarding(&self, family: Family, on: bool) -> Result<()> {
        if !self.works("forwarding")? {
            return Ok(());
        }
        let mut forwarding = self.forwarding.lock().unwrap();
        match on {
            true => forwarding.insert(family),
            false => forwarding.remove(&family),
        };
        Ok(())
    }

    fn boot_files(&self) -> Result<BTreeMap<Family, PathBuf>> {
        Ok(Family::BOTH
            .map(|family| (family, PathBuf::from(format!("/rules.{}", family.as_str()))))
            .into())
    }

    fn load(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        Ok(self.files.lock().unwrap().get(path).cloned())
    }

    fn store(&self, path: &Path, text: Option<&[u8]>, _: u32) -> Result<()> {
        if !self.works("store")? {
            return Ok(());
        }
        let mut files = self.files.lock().unwrap();
        match text {
            Some(text) => files.insert(path.to_owned(), text.to_vec()),
            None => files.remove(path),
        };
        Ok(())
    }

    fn connections(
        &self,
        family: Family,
        filters: &[ReplyFilter],
        wanted: &dyn Fn(&ConntrackEntry) -> bool,
    ) -> Result<Vec<Vec<u8>>> {
        self.works("connections")?;
        let connections = self.connections.lock().unwrap();
        let found = connections.iter().enumerate();
        // As the kernel does it: an entry that matches no filter is not shown.
        let passes = |entry: &ConntrackEntry| {
            filters.iter().any(|filter| {
                let (address, port) = entry.reply_source;
                filter.protocol.number() == entry.protocol
                    && filter.backend.address == address
                    && filter.backend.port.is_none_or(|wanted| wanted == port)
            })
        };
        let found =
            found.filter(|(_, (of, entry))| *of == family && passes(entry) && wanted(entry));
        Ok(found
            .map(|(at, _)| vec![u8::try_from(at).unwrap()])
            .collect())
    }

    fn delete_connections(&self, _: Family, connections: &[Vec<u8>]) -> Result<()> {
        self.works("end")?;
        let mut known = self.connections.lock().unwrap();
        let mut places: Vec<_> = connections
            .iter()
            .map(|name| usize::from(name[0]))
            .collect();
        places.sort_unstable();
        for at in places.into_iter().rev() {
            known.remove(at);
        }
        Ok(())
    }
}

/// A whole dump that was read already.
pub struct Saved(pub Vec<u8>);

impl PendingSave for Saved {
    fn finish(self: Box<Self>) -> Result<Vec<u8>> {
        Ok(self.0)
    }
}

/// Dumps that were read already.
pub struct Ready(pub Vec<Result<Ruleset>>);

impl PendingRead for Ready {
    fn is_ready(&self) -> bool {
        true
    }

    fn finish(self: Box<Self>) -> Vec<Result<Ruleset>> {
        self.0
    }
}
