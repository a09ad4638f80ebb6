//! The host that this program runs on.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use super::lock::xtables_held;
use super::process::{Finished, Process};
use super::programs::Programs;
use super::saves::{Dump, Saves};
use super::whole_save::WholeSave;
use super::{
    Dumps, Facts, Host, Lock, PendingRead, PendingSave, Query, Questions, ReplyFilter, Scope,
};
use super::{boot, conntrack, facts, files, forwarding_sysctl, jumps, nftables};
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{ConntrackEntry, Family, Name, Table, Variant};

/// The time limit of a program, beside the time that it may wait for locks.
const PATIENCE: Duration = Duration::from_secs(60);

/// The host that this program runs on.
#[derive(Debug)]
pub struct System {
    programs: Programs,
    wait: u32,
    /// The lock, where the caller holds it already.
    lock: Option<Rc<Lock>>,
    /// The dumps of earlier runs of the session, on nft.
    pub(super) dumps: Option<Rc<Dumps>>,
    /// The forwarding of each interface before we switched it on.
    interfaces: RefCell<BTreeMap<Family, Vec<(PathBuf, bool)>>>,
}

impl System {
    /// Settles on a variant; `wait` is the time to wait for locks, in seconds.
    ///
    /// # Errors
    /// When there is no such iptables; names the package to install.
    pub fn open(choice: Option<Variant>, wait: u32) -> Result<Self> {
        Ok(Self {
            programs: Programs::choose(choice)?,
            wait: wait.max(1),
            lock: None,
            dumps: None,
            interfaces: RefCell::default(),
        })
    }

    /// The same host within a session, whose dumps are kept.
    #[must_use]
    pub fn in_session(mut self, dumps: &Rc<Dumps>) -> Self {
        let is_counted = self.variant() == Variant::Nft;
        self.dumps = is_counted.then(|| Rc::clone(dumps));
        self
    }

    /// The lock, if nobody else has it now.
    ///
    /// # Errors
    /// When its file cannot be opened.
    pub fn try_lock(&self) -> Result<Option<Rc<Lock>>> {
        match &self.lock {
            Some(lock) => Ok(Some(Rc::clone(lock))),
            None => Ok(Lock::try_take()?.map(Rc::new)),
        }
    }

    /// The same host for a caller that holds the lock.
    #[must_use]
    pub fn under(mut self, lock: Rc<Lock>) -> Self {
        self.lock = Some(lock);
        self
    }

    /// A dump that was kept, or one that is started.
    pub(super) fn dump(&self, query: Query) -> Result<Dump> {
        let kept = self.dumps.as_ref().and_then(|dumps| dumps.get(query));
        if let Some(text) = kept {
            return Ok(Dump::Kept(text));
        }
        let generation = self.dumps.as_ref().and_then(|_| Dumps::generation(query));
        Ok(match self.start_save(query)? {
            None => Dump::Nothing,
            Some(process) => Dump::Started {
                process: process.into(),
                generation,
            },
        })
    }

    /// Starts a dump; `None` where no table exists that could be read.
    fn start_save(&self, query: Query) -> Result<Option<Process>> {
        let Query { family, scope, .. } = query;
        let table = match scope {
            Scope::All => None,
            Scope::Only(table) => Some(table),
        };
        if table.is_some_and(|table| !may_have_table(self.variant(), family, table)) {
            return Ok(None);
        }
        let mut arguments = Vec::new();
        if query.counters {
            arguments.push(OsStr::new("-c"));
        }
        if let Some(table) = table {
            arguments.extend(["-t", table.as_str()].map(OsStr::new));
        }
        let program = self.programs.path(family, "save")?;
        Process::start(&program, &arguments, self.limit()).map(Some)
    }

    /// The tables that exist and that a dump omits. From 1.8.4 on
    /// iptables-nft-save names them itself.
    pub(super) fn hidden(&self, query: Query, found: &Ruleset) -> Vec<String> {
        let wanted = match query.scope {
            Scope::All => vec![Table::Nat, Table::Filter],
            Scope::Only(table) => vec![table],
        };
        let is_hidden = |table: &Table| {
            self.variant() == Variant::Nft
                && found.unreadable.is_empty()
                && !found.shown.contains(table)
                && nftables::has_table(query.family, *table) == Some(true)
        };
        let hidden = wanted.into_iter().filter(is_hidden);
        hidden.map(|table| table.as_str().to_owned()).collect()
    }

    /// Finds numbers and deletes them while nobody else can take the lock of
    /// xtables, see [`jumps`].
    fn delete_jumps_by_number(&self, family: Family, table: Table, name: &Name) -> Result<()> {
        let _lock = Lock::of_xtables(self.patience())?;
        let lock_file = tempfile::NamedTempFile::new().context("a lock file for iptables")?;
        let environment = [("XTABLES_LOCKFILE", lock_file.path().as_os_str())];
        let start = |tool, arguments: &[&str]| {
            let program = self.programs.path(family, tool)?;
            let arguments: Vec<_> = arguments.iter().map(OsStr::new).collect();
            Process::start_with(&program, &arguments, self.limit(), &environment)
        };
        let mut dump = Vec::new();
        let save = start("save", &["-t", table.as_str()])?;
        let finished = save.drain(&mut |piece| dump.extend_from_slice(piece));
        finished?.success()?;
        match jumps::deletion_by_number(&dump, table, name) {
            None => Ok(()),
            Some(transaction) => start("restore", &["--noflush", "-w", "1"])?
                .feed(&transaction, &mut || ())?
                .success(),
        }
    }

    /// The time to wait for locks.
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

    fn lock(&self) -> Result<Rc<Lock>> {
        match &self.lock {
            Some(lock) => Ok(Rc::clone(lock)),
            None => Lock::take(self.patience()).map(Rc::new),
        }
    }

    fn generation(&self) -> Option<u32> {
        match self.variant() {
            Variant::Nft => nftables::generation(),
            Variant::Legacy => None,
        }
    }

    fn begin_read<'a>(&'a self, name: &'a Name, queries: Vec<Query>) -> Box<dyn PendingRead + 'a> {
        Box::new(Saves::begin(self, name, queries))
    }

    fn begin_save<'a>(&'a self, family: Family) -> Result<Box<dyn PendingSave + 'a>> {
        let query = Query {
            family,
            scope: Scope::All,
            counters: true,
        };
        let mut tables = [Table::Nat, Table::Filter].into_iter();
        let may_have_rules = self.supports(family)
            && tables.any(|table| may_have_table(self.variant(), family, table));
        let process = may_have_rules.then(|| self.start_save(query)).transpose()?;
        Ok(Box::new(WholeSave::new(process.flatten())))
    }

    fn restore(
        &self,
        family: Family,
        transaction: &[u8],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<()> {
        let program = self.programs.path(family, "restore")?;
        let wait = self.wait.to_string();
        let mut run = |options: &[&str]| {
            let arguments = ["--noflush"].iter().chain(options).map(OsStr::new);
            let arguments: Vec<_> = arguments.collect();
            Process::start(&program, &arguments, self.limit())?.feed(transaction, meanwhile)
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
            _ => {
                let error = match lacks_bpf(&finished.stderr) {
                    true => finished.failure().context(NO_BPF),
                    false => finished.failure(),
                };
                Err(match refused_line(&finished.stderr, transaction) {
                    Some(line) => anyhow!("{error:#}, at `{line}`"),
                    None => error,
                })
            }
        }
    }

    fn delete_jumps(&self, family: Family, table: Table, name: &Name) -> Result<()> {
        let deleting = || {
            format!(
                "deleting the {} jumps to `{}` by which iptables cannot find its rules (-m recent, -m connlimit)",
                family.title(),
                name.as_str()
            )
        };
        match self.variant() {
            Variant::Nft => Ok(jumps::delete_by_handle(family, table, name)?),
            Variant::Legacy => self.delete_jumps_by_number(family, table, name),
        }
        .with_context(deleting)
    }

    fn other_variant_in_use(&self) -> bool {
        let other = self.variant().other();
        Family::BOTH.into_iter().any(|family| match other {
            Variant::Legacy => legacy_rules(family),
            Variant::Nft => nftables::has_iptables_rules(family).unwrap_or(false),
        })
    }

    fn hides_source_nat(&self) -> bool {
        nftables::rewrites_sources() == Some(true)
    }

    fn facts(&self, questions: &Questions) -> Facts {
        facts::facts(questions)
    }

    fn forwarding(&self, family: Family) -> Option<bool> {
        facts::forwarding(family)
    }

    fn set_forwarding(&self, family: Family, on: bool) -> Result<()> {
        let doing = || format!("setting {} to {}", forwarding_sysctl(family), u8::from(on));
        let before = facts::set_forwarding(family, on).with_context(doing)?;
        let mut interfaces = self.interfaces.borrow_mut();
        match on {
            true => {
                interfaces.insert(family, before);
                Ok(())
            }
            false => {
                let before = interfaces.remove(&family).unwrap_or_default();
                facts::set_interfaces(&before).with_context(doing)
            }
        }
    }

    /// The program that loads them at boot is `iptables-restore` by its plain name.
    fn boot_files(&self) -> Result<BTreeMap<Family, PathBuf>> {
        let files = boot::files(Path::new("/"))?;
        let at_boot = Programs::choose(None)?.variant;
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

    fn store(&self, path: &Path, text: Option<&[u8]>, mode: u32) -> Result<()> {
        files::store(path, text, mode)
    }

    fn connections(
        &self,
        family: Family,
        filters: &[ReplyFilter],
        wanted: &dyn Fn(&ConntrackEntry) -> bool,
    ) -> Result<Vec<Vec<u8>>> {
        let listing = || {
            format!(
                "listing the {} connections (module nf_conntrack_netlink)",
                family.title()
            )
        };
        conntrack::translated(family, filters, wanted).with_context(listing)
    }

    fn delete_connections(&self, family: Family, identifiers: &[Vec<u8>]) -> Result<()> {
        let ending = || format!("ending {} connections", family.title());
        conntrack::delete(family, identifiers).with_context(ending)
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

/// Returns true if a table can have rules, or if that is not known.
fn may_have_table(variant: Variant, family: Family, table: Table) -> bool {
    let is_among = |names: String| names.lines().any(|name| name == table.as_str());
    match variant {
        Variant::Legacy => legacy_tables(family).is_none_or(is_among),
        Variant::Nft => nftables::has_table(family, table).unwrap_or(true),
    }
}

/// Returns true if a legacy table holds a rule. The tables exist already, so
/// the program that reads them loads no module.
fn legacy_rules(family: Family) -> bool {
    if legacy_tables(family).is_none_or(|names| names.trim().is_empty()) {
        return false;
    }
    let Ok(programs) = Programs::choose(Some(Variant::Legacy)) else {
        return true;
    };
    let Ok(program) = programs.path(family, "save") else {
        return true;
    };
    let (mut found, mut line_starts, mut dash) = (false, true, false);
    let mut find_rule = |piece: &[u8]| {
        for byte in piece {
            found |= dash && *byte == b'A';
            dash = line_starts && *byte == b'-';
            line_starts = *byte == b'\n';
        }
    };
    let drained = Process::start(&program, &[], PATIENCE)
        .and_then(|process| process.drain(&mut find_rule))
        .and_then(Finished::success);
    drained.is_err() || found
}

/// The way out where `-m bpf` is missing.
const NO_BPF: &str = "`mode: hash` needs iptables and a kernel with `-m bpf` (libxt_bpf.so, xt_bpf); without them, \
                      `mode: random` shares out too, but keeps no client with its backend";

/// Returns true if iptables complains that it, or the kernel, does not know `-m bpf`.
fn lacks_bpf(stderr: &str) -> bool {
    // The first is about the library of iptables, the second about the kernel (1.8.9).
    ["match `bpf'", "Extension bpf revision"]
        .iter()
        .any(|words| stderr.contains(words))
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
