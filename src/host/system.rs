//! This host.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use super::lock::xtables_held;
use super::programs::Programs;
use super::{Host, Lock, PendingRead, Query, Scope, Variant};
use super::{boot, conntrack, facts, files, nftables, process};
use crate::effects::{ConntrackEntry, setting};
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Family, Table};
use crate::preflight::{Facts, Questions};
use crate::request::VariantChoice;

/// Programs are given this long besides the time that they may wait for locks.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often to start an `iptables-save` that crashes.
const SAVES: u32 = 3;

/// The host that this program runs on.
#[derive(Debug)]
pub struct System {
    programs: Programs,
    wait: u32,
    /// How each interface was forwarded before we switched forwarding on.
    interfaces: Mutex<BTreeMap<Family, Vec<(PathBuf, bool)>>>,
}

impl System {
    /// Settles on a variant; `wait` is how many seconds to wait for locks.
    ///
    /// # Errors
    /// When there is no such iptables: what to install.
    pub fn open(choice: VariantChoice, wait: u32) -> Result<Self> {
        Ok(Self {
            programs: Programs::choose(choice)?,
            wait: wait.max(1),
            interfaces: Mutex::default(),
        })
    }

    /// Nothing is started where there can be nothing to read.
    fn start_save(&self, family: Family, look: Query<'_>) -> Result<Option<process::Started>> {
        let table = match look.scope {
            Scope::All => None,
            Scope::Only(table) => Some(table),
        };
        if table.is_some_and(|table| !may_have_table(self.variant(), family, table)) {
            return Ok(None);
        }
        let mut arguments = Vec::new();
        if look.counters {
            arguments.push(OsStr::new("-c"));
        }
        if let Some(table) = table {
            arguments.extend(["-t", table.as_str()].map(OsStr::new));
        }
        let program = self.programs.path(family, "save")?;
        process::start(&program, &arguments, self.limit())
            .map(Some)
            .with_context(|| format!("reading the {} rules", family.title()))
    }

    /// The tables that are there and that a dump passes over. From 1.8.4 on
    /// iptables-nft-save says so itself.
    fn hidden(&self, family: Family, scope: Scope, found: &Ruleset) -> Vec<String> {
        let wanted = match scope {
            Scope::All => vec![Table::Nat, Table::Filter],
            Scope::Only(table) => vec![table],
        };
        let is_hidden = |table: &Table| {
            self.variant() == Variant::Nft
                && found.unreadable.is_empty()
                && !found.shown.contains(table)
                && nftables::has_table(family, *table) == Some(true)
        };
        let hidden = wanted.into_iter().filter(is_hidden);
        hidden.map(|table| table.as_str().to_owned()).collect()
    }

    /// How long to wait for locks.
    fn patience(&self) -> Duration {
        Duration::from_secs(u64::from(self.wait))
    }

    fn limit(&self) -> Duration {
        PATIENCE + self.patience()
    }
}

impl Host for System {
    fn variant(&self) -> Variant {
        self.programs.variant
    }

    fn supports(&self, family: Family) -> bool {
        ["save", "restore"]
            .iter()
            .all(|tool| self.programs.path(family, tool).is_ok())
    }

    fn lock(&self) -> Result<Lock> {
        Lock::take(self.patience())
    }

    fn begin_read<'a>(&'a self, family: Family, look: Query<'a>) -> Box<dyn PendingRead + 'a> {
        Box::new(Save {
            host: self,
            family,
            look,
            started: self.start_save(family, look),
        })
    }

    fn restore(&self, family: Family, transaction: &[u8]) -> Result<()> {
        let program = self.programs.path(family, "restore")?;
        let limit = self.limit();
        let wait = self.wait.to_string();
        let run = |options: &[&str]| {
            let arguments = ["--noflush"].iter().chain(options).map(OsStr::new);
            let arguments: Vec<_> = arguments.collect();
            process::run(&program, &arguments, transaction, limit)
        };
        let finished = match self.variant() {
            // It takes no lock. Until 1.8.1 it took the seconds for a file.
            Variant::Nft => run(&[])?,
            Variant::Legacy => match run(&["-w", &wait])? {
                // Before 1.6.2 it neither knew the option nor took a lock.
                finished if finished.stderr.contains("invalid option -- 'w'") => {
                    let _lock = Lock::of_xtables(self.patience())?;
                    run(&[])?
                }
                finished => finished,
            },
        };
        match finished.code {
            Some(0) => Ok(()),
            Some(4) if finished.stderr.contains("xtables lock") => {
                bail!("{}", xtables_held(self.patience()))
            }
            code => {
                let error = process::failure(&program, &finished.stderr, code);
                Err(match refused_line(&finished.stderr, transaction) {
                    Some(line) => anyhow!("{error}, at `{line}`"),
                    None => error,
                })
            }
        }
    }

    fn other_variant_in_use(&self) -> bool {
        let other = self.variant().other();
        Family::BOTH.into_iter().any(|family| match other {
            Variant::Legacy => legacy_rules(family),
            Variant::Nft => nftables::has_iptables_rules(family).unwrap_or(false),
        })
    }

    fn facts(&self, questions: &Questions) -> Facts {
        facts::facts(questions)
    }

    fn forwarding(&self, family: Family) -> Option<bool> {
        facts::forwarding(family)
    }

    fn set_forwarding(&self, family: Family, on: bool) -> Result<()> {
        let doing = || format!("setting {} to {}", setting(family), u8::from(on));
        let mut interfaces = self
            .interfaces
            .lock()
            .map_err(|_| anyhow!("a thread panicked"))?;
        let was = facts::set_forwarding(family, on).with_context(doing)?;
        match on {
            true => {
                interfaces.insert(family, was);
                Ok(())
            }
            false => {
                let were = interfaces.remove(&family).unwrap_or_default();
                facts::set_interfaces(&were).with_context(doing)
            }
        }
    }

    /// What loads them at boot is `iptables-restore` by its plain name.
    fn boot_files(&self) -> Result<BTreeMap<Family, PathBuf>> {
        let files = boot::files(Path::new("/"))?;
        let at_boot = Programs::choose(VariantChoice::Auto)?.variant;
        if at_boot != self.variant() {
            bail!(
                "persist: at boot rules are loaded by `iptables-restore`, which is {} here, but `variant` is {}; \
                 name the file that is loaded into that one, or leave out `variant`",
                at_boot.as_str(),
                self.variant().as_str()
            );
        }
        Ok(files)
    }

    fn load(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        files::load(path)
    }

    fn store(&self, path: &Path, text: Option<&[u8]>) -> Result<()> {
        files::store(path, text)
    }

    fn connections(
        &self,
        family: Family,
        wanted: &dyn Fn(&ConntrackEntry) -> bool,
    ) -> Result<Vec<Vec<u8>>> {
        let listing = || {
            format!(
                "listing the {} connections (module nf_conntrack_netlink)",
                family.title()
            )
        };
        conntrack::translated(family, wanted).with_context(listing)
    }

    fn end(&self, family: Family, connections: &[Vec<u8>]) -> Result<()> {
        let ending = || format!("ending {} connections", family.title());
        conntrack::end(family, connections).with_context(ending)
    }
}

/// An `iptables-save` that was started, unless there can be nothing to read.
struct Save<'a> {
    host: &'a System,
    family: Family,
    look: Query<'a>,
    started: Result<Option<process::Started>>,
}

impl Save<'_> {
    fn read(&self, output: &mut process::Output) -> Result<Ruleset> {
        let mut ruleset = Ruleset::read(output, self.look.name)?;
        let hidden = self.host.hidden(self.family, self.look.scope, &ruleset);
        ruleset.unreadable.extend(hidden);
        Ok(ruleset)
    }
}

impl PendingRead for Save<'_> {
    fn is_ready(&self) -> bool {
        match &self.started {
            Ok(Some(save)) => save.has_printed(),
            Ok(None) | Err(_) => true,
        }
    }

    fn finish(mut self: Box<Self>) -> Result<Ruleset> {
        let mut started = std::mem::replace(&mut self.started, Ok(None));
        for attempt in 1.. {
            let Some(save) = started? else {
                break;
            };
            match save.consume(|output| self.read(output)) {
                // Until 1.8.4 iptables-nft-save crashes when rules change meanwhile.
                Err(error) if attempt < SAVES && error.is::<process::Crashed>() => {
                    started = self.host.start_save(self.family, self.look);
                }
                read => {
                    let reading = || format!("reading the {} rules", self.family.title());
                    return read.with_context(reading);
                }
            }
        }
        Ok(Ruleset::default())
    }
}

/// The tables that legacy iptables has in this network namespace, a line each;
/// `None` where that cannot be known. Reading this loads no module, where
/// running `iptables-legacy` would.
fn legacy_tables(family: Family) -> Option<String> {
    let directory = Path::new("/proc/net");
    let names = directory.join(match family {
        Family::Ipv4 => "ip_tables_names",
        Family::Ipv6 => "ip6_tables_names",
    });
    match fs::read_to_string(names) {
        Ok(names) => Some(names),
        // Without the module there is no such file, and there are no tables.
        Err(error) if error.kind() == ErrorKind::NotFound && directory.is_dir() => {
            Some(String::new())
        }
        Err(_) => None,
    }
}

/// Whether a table can have rules. Where that is not known it can.
fn may_have_table(variant: Variant, family: Family, table: Table) -> bool {
    let is_among = |names: String| names.lines().any(|name| name == table.as_str());
    match variant {
        Variant::Legacy => legacy_tables(family).is_none_or(is_among),
        Variant::Nft => nftables::has_table(family, table).unwrap_or(true),
    }
}

/// Whether a legacy table holds a rule. The tables are there already, so the
/// program that reads them loads nothing.
fn legacy_rules(family: Family) -> bool {
    if legacy_tables(family).is_none_or(|names| names.trim().is_empty()) {
        return false;
    }
    let Ok(programs) = Programs::choose(VariantChoice::Legacy) else {
        return true;
    };
    let Ok(program) = programs.path(family, "save") else {
        return true;
    };
    let mentions_rule = |output: &mut process::Output| {
        let mut found = false;
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line)? > 0 {
            found |= line.starts_with(b"-A");
            line.clear();
        }
        Ok(found)
    };
    let started = process::start(&program, &[], PATIENCE);
    started
        .and_then(|started| started.consume(mentions_rule))
        .unwrap_or(true)
}

/// The line of the transaction that `iptables-restore` complains of.
fn refused_line(stderr: &str, transaction: &[u8]) -> Option<String> {
    let digits = |text: &str| {
        text.chars()
            .take_while(char::is_ascii_digit)
            .collect::<String>()
    };
    let number = ["at line: ", "line "].iter().find_map(|mark| {
        let mut after = stderr.split(mark).skip(1).map(digits);
        after.find_map(|number| number.parse::<usize>().ok())
    })?;
    let line = transaction
        .split(|byte| *byte == b'\n')
        .nth(number.checked_sub(1)?)?;
    Some(String::from_utf8_lossy(line).into_owned()).filter(|line| !line.is_empty())
}
