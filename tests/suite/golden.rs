//! Recorded cases, each a folder: a request, a dump, the transaction that
//! turns the one into the other, and the reply of a check.
//! `UPDATE=1 cargo test` records the last two anew.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use iptables_balance::converge::converge;
use iptables_balance::converge::outcome::RunMode;
use iptables_balance::converge::prefetch::Prefetch;
use iptables_balance::diff;
use iptables_balance::host::{
    Facts, Host, Lock, PendingRead, PendingSave, Query, Questions, ReplyFilter,
};
use iptables_balance::netfilter::ruleset::Ruleset;
use iptables_balance::netfilter::{ConntrackEntry, Family, Name, Table, Variant};
use iptables_balance::plan::Plan;
use iptables_balance::report::{Prewriter, Report};
use iptables_balance::request::Request;
use iptables_balance::restore::{Step, steps};
use serde_json::Value;

use crate::fake::{Ready, Saved};
use crate::spec::assert_fresh;

/// A host that has nothing but an IPv4 dump.
struct Recorded(Vec<u8>);

impl Host for Recorded {
    fn variant(&self) -> Variant {
        Variant::Nft
    }

    fn supports(&self, family: Family) -> bool {
        family == Family::Ipv4
    }

    fn lock(&self) -> anyhow::Result<Rc<Lock>> {
        Ok(Rc::new(Lock::none()))
    }

    fn generation(&self) -> Option<u32> {
        None
    }

    fn begin_read<'a>(&'a self, name: &'a Name, queries: Vec<Query>) -> Box<dyn PendingRead + 'a> {
        assert!(queries.iter().all(|query| query.family == Family::Ipv4));
        let read = |_| Ok(Ruleset::read(&self.0, name)?);
        Box::new(Ready(queries.into_iter().map(read).collect()))
    }

    fn begin_save<'a>(&'a self, _: Family) -> anyhow::Result<Box<dyn PendingSave + 'a>> {
        Ok(Box::new(Saved(Vec::new())))
    }

    fn restore(&self, _: Family, _: &[u8], _: &mut dyn FnMut()) -> anyhow::Result<()> {
        unreachable!("a check writes nothing")
    }

    fn delete_jumps(&self, _: Family, _: Table, _: &Name) -> anyhow::Result<()> {
        unreachable!("a check writes nothing")
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

    fn forwarding(&self, _: Family) -> Option<bool> {
        Some(true)
    }

    fn set_forwarding(&self, _: Family, _: bool) -> anyhow::Result<()> {
        unreachable!("a check writes nothing")
    }

    fn boot_files(&self) -> anyhow::Result<BTreeMap<Family, PathBuf>> {
        Ok(BTreeMap::new())
    }

    fn load(&self, _: &Path) -> anyhow::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn store(&self, _: &Path, _: Option<&[u8]>, _: u32) -> anyhow::Result<()> {
        unreachable!("a check writes nothing")
    }

    fn connections(
        &self,
        _: Family,
        _: &[ReplyFilter],
        _: &dyn Fn(&ConntrackEntry) -> bool,
    ) -> anyhow::Result<Vec<Vec<u8>>> {
        Ok(Vec::new())
    }

    fn delete_connections(&self, _: Family, _: &[Vec<u8>]) -> anyhow::Result<()> {
        unreachable!("a check writes nothing")
    }
}

#[test]
fn recorded_cases() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut seen = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let case = entry.unwrap().path();
        let name = case.file_name().unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(case.join("request.json")).unwrap();
        let Value::Object(object) = serde_json::from_str(&text).unwrap() else {
            panic!("{name}")
        };
        let request = Request::from_json(object).unwrap();
        let dump = fs::read(case.join("dump")).unwrap();

        let found = Ruleset::read(&dump, &request.name).unwrap();
        let changes = diff::to_plan(&Plan::new(&request), Family::Ipv4, &found);
        let restore = match steps(&changes, Family::Ipv4, &found).as_slice() {
            [] => Vec::new(),
            [Step::Transaction(text)] => text.clone(),
            more => panic!("{more:?}"),
        };
        assert_fresh(
            &format!("tests/golden/{name}/restore"),
            &String::from_utf8(restore).unwrap(),
        );

        let host = Recorded(dump);
        let outcome = converge(&host, &request, RunMode::Check, &mut Prefetch::default()).unwrap();
        let report = Report::new(request, outcome, Prewriter::default(), RunMode::Check);
        let reply = serde_json::to_string_pretty(&report.with_diff()).unwrap() + "\n";
        assert_fresh(&format!("tests/golden/{name}/reply.json"), &reply);
        seen += 1;
    }
    assert!(seen >= 6, "only {seen} cases were found");
}
