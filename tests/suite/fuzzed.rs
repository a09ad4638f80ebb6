//! Properties that hold for any input at all. `tests/fuzz` runs these under
//! cargo-fuzz; here each runs on its recorded inputs and on some thousand
//! variations of them.

use std::collections::BTreeSet;

use iptables_balance::converge::converge;
use iptables_balance::converge::outcome::{Outcome, RunMode};
use iptables_balance::converge::prefetch::Prefetch;
use iptables_balance::diff;
use iptables_balance::frontend::cfengine;
use iptables_balance::host::Scope;
use iptables_balance::netfilter::rule::Rule;
use iptables_balance::netfilter::ruleset::Ruleset;
use iptables_balance::netfilter::{Family, PortRange, Protocol, Table};
use iptables_balance::plan::Plan;
use iptables_balance::report::Report;
use iptables_balance::request::{
    Balancer, Destination, Mode, Name, Pool, Request, UncheckedRequest, WhenEmpty, json,
};
use iptables_balance::restore::{self, Step};
use serde_json::Value;

use crate::fake::Fake;
use crate::model::{Connection, Model};

fn apply(host: &Fake, request: &Request) -> Outcome {
    let begun = Prefetch::begin(host, &request.name, Scope::Only(Table::Nat), None);
    converge(host, request, RunMode::Apply, &mut begun.finish()).unwrap()
}

/// A request is refused in one line that names something, or its rules are the
/// only lines of the transaction.
pub fn request(input: &[u8]) {
    let Ok(Value::Object(object)) = json::parse(input) else {
        return;
    };
    match UncheckedRequest::from_json(object) {
        Err(error) => {
            let text = error.to_string();
            assert!(
                !text.is_empty() && !text.contains(char::is_control),
                "{text:?}"
            );
        }
        Ok(draft) => {
            if let Ok(request) = draft.resolve(&|_| Ok(vec!["192.0.2.77".parse().unwrap()])) {
                only_our_lines(&request);
            }
        }
    }
}

fn only_our_lines(request: &Request) {
    let plan = Plan::new(request);
    let nothing = Ruleset::default();
    for family in Family::BOTH {
        let changes = diff::to_plan(&plan, family, &nothing);
        let live = restore::steps(&changes, family, &nothing).into_iter();
        let live = live.map(|step| match step {
            Step::Transaction(text) => text,
            other @ Step::DeleteJumps(_) => panic!("{other:?}"),
        });
        let live = live.collect::<Vec<_>>().concat();
        let file = restore::from_nothing(&changes, family).unwrap_or_default();
        let text = String::from_utf8([live, file].concat()).unwrap();
        let name = request.name.as_str();
        for line in text.lines() {
            let mut words = line.split(' ');
            let (command, chain) = (words.next().unwrap(), words.next().unwrap_or_default());
            let is_ours = match command {
                "*nat" | "*filter" | "COMMIT" => chain.is_empty(),
                "-A" | "-I" => {
                    let target = line.rsplit_once(['j', 'g']).is_some();
                    let leads = ["PREROUTING", "OUTPUT", "POSTROUTING", "INPUT", "FORWARD"];
                    target
                        && (leads.contains(&chain)
                            || chain == name
                            || chain.starts_with(&format!("{name}/")))
                }
                "-N" => chain == name || chain.starts_with(&format!("{name}/")),
                declared => {
                    declared == format!(":{name}") || declared.starts_with(&format!(":{name}/"))
                }
            };
            assert!(
                is_ours && !line.contains(char::is_control),
                "{line:?} in\n{text}"
            );
        }
    }
}

/// A dump is refused, or its owned rules survive a round trip.
pub fn dump(input: &[u8]) {
    let name = Name::new("W").unwrap();
    let Ok(read) = Ruleset::read(input, &name) else {
        return;
    };
    for (table, owned) in &read.tables {
        let rules = owned.chains.values().flat_map(|chain| &chain.rules);
        for rule in rules.chain(owned.jumps.iter().map(|lead| &lead.rule)) {
            if let Some(meaning) = &rule.meaning {
                assert_eq!(
                    Rule::parse(*table, &meaning.to_string()).as_ref(),
                    Ok(meaning)
                );
            }
        }
    }
}

/// Whatever the agent sends, it gets replies that are whole, each with an
/// operation and a result.
pub fn session(input: &[u8]) {
    let mut session = b"cf-agent 3.21.0 v1\n\n".to_vec();
    session.extend(input);
    let mut out = Vec::new();
    cfengine::run(session.as_slice(), &mut out, &|_| Report::default()).unwrap();
    let text = String::from_utf8(out).unwrap();
    let mut replies = text.split_terminator("\n\n");
    assert!(
        replies.next().unwrap().starts_with("iptables_balance "),
        "{text}"
    );
    for reply in replies {
        let last = reply.lines().last().unwrap();
        let reply: Value =
            serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(
            reply["operation"].is_string() && reply["result"].is_string(),
            "{reply}"
        );
    }
}

/// A request and lines of rules, divided by a line `%`, on a model of iptables:
/// it converges in one run, the second does nothing, and foreign rules stay.
pub fn host(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let (wanted, rules) = text.split_once("\n%\n").unwrap_or((&text, ""));
    let Ok(Value::Object(mut object)) = json::parse(wanted.as_bytes()) else {
        return;
    };
    object.insert("name".to_owned(), "W".into());
    object.remove("chain");
    let Ok(request) = Request::from_json(object) else {
        return;
    };
    let backends: usize = request.pools().map(|(_, pool)| pool.backends.len()).sum();
    if backends > 200 {
        return;
    }
    let models = [false, true].map(|ipv6| {
        let mut model = Model::new(ipv6);
        model
            .restore("*nat\n:DOCKER - [0:0]\n:W - [0:0]\n:W/old - [0:0]\nCOMMIT\n")
            .unwrap();
        for rule in rules.lines() {
            // Lines that iptables would refuse are left out.
            let _ = model.restore(&format!("*nat\n{rule}\nCOMMIT\n"));
            let _ = model.restore(&format!("*filter\n{rule}\nCOMMIT\n"));
        }
        model
    });
    let [ipv4, ipv6] = models;
    let host = Fake::new(ipv4, ipv6);
    let before = host.dump();
    let others = foreign(&before);
    let Ok(predicted) = converge(&host, &request, RunMode::Check, &mut Prefetch::default()) else {
        return;
    };
    assert_eq!(foreign(&host.dump()), others);
    let done = apply(&host, &request);
    if let Some(failure) = &done.failure {
        // A rule of others that leads into a chain of ours by a negated or unknown way cannot be deleted.
        assert!(
            failure.ends_with("; the host is as before"),
            "{failure}\n{text}"
        );
        assert_eq!(foreign(&host.dump()), others);
        return;
    }
    assert_eq!(done.steps.changes, predicted.steps.changes);
    assert_eq!(foreign(&host.dump()), others);
    let again = apply(&host, &request);
    assert!(again.steps.is_empty(), "{:?}\n{text}", again.steps);
    if rules.trim().is_empty() {
        first_wins(&host, &request);
    }
}

/// The first balancer of a set that claims a port gets its connections, as far as
/// the model follows them: by protocol and port, and in turn.
fn first_wins(host: &Fake, request: &Request) {
    let is_followed = |balancer: &Balancer| {
        balancer.mode == Mode::Nth
            && balancer.destination == Destination::Any
            && balancer.sources.is_empty()
            && balancer.in_interface.is_none()
    };
    if !request.is_set() || !request.balancers().iter().all(is_followed) {
        return;
    }
    let ranges = request
        .balancers()
        .iter()
        .flat_map(|balancer| balancer.destination_ports.all_ranges());
    let edges = |range: &PortRange| {
        let PortRange { first, last } = *range;
        [first, last, first.saturating_sub(1), last.saturating_add(1)]
    };
    let ports: BTreeSet<u16> = ranges.flat_map(edges).take(400).collect();
    for (family, port) in Family::BOTH
        .into_iter()
        .flat_map(|family| ports.iter().map(move |port| (family, *port)))
    {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let claims = |(balancer, pool): &(&Balancer, &Pool)| {
                let passes = pool.is_empty() && balancer.gateway.when_empty == WhenEmpty::Pass;
                pool.family == family
                    && balancer.protocol == protocol
                    && balancer.destination_ports.include(port)
                    && !passes
            };
            let pool = request.pools().find(claims).map(|(_, pool)| pool);
            let serving = pool.into_iter().flat_map(|pool| &pool.backends);
            let serving: BTreeSet<String> = serving
                .filter(|backend| backend.weight > 0)
                .map(|backend| backend.endpoint.to_string())
                .collect();
            let connection = Connection {
                protocol: protocol.as_str(),
                port,
            };
            let got = host.model(family).lock().unwrap().connect(connection);
            let is_right = match got.as_ref() {
                Some(server) => serving.contains(server),
                None => serving.is_empty(),
            };
            assert!(
                is_right,
                "{protocol:?} {port}: {got:?} is not of {serving:?}"
            );
        }
    }
}

fn foreign(dump: &str) -> Vec<&str> {
    let is_ours = |line: &&str| {
        let mut words = line.split([' ', ':']);
        words.any(|word| word == "W" || word.starts_with("W/"))
    };
    dump.lines().filter(|line| !is_ours(line)).collect()
}
