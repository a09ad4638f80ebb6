//! The state of a host beside its rules: files that are loaded at boot, names,
//! and requests that would do harm.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::lab::{Lab, Namespace, VARIANTS, shown};

fn file(host: &Namespace, path: &str) -> Option<String> {
    fs::read_to_string(host.etc.as_ref().unwrap().join(path)).ok()
}

fn written(result: &Value) -> Vec<&str> {
    let changes = result["changes"].as_array().unwrap().iter();
    let files = changes.filter(|change| change["action"] == "write_file");
    files
        .map(|change| change["rule"].as_str().unwrap())
        .collect()
}

/// A reboot: every table is empty, and what was saved is loaded.
fn reboot(gateway: &Namespace, variant: &str, files: [&PathBuf; 2]) {
    let programs = ["iptables", "ip6tables"].map(|program| format!("{program}-{variant}-restore"));
    let load = |program: &str, text: &str| {
        let loaded = gateway.feed(&[program], text);
        assert!(loaded.status.success(), "{}", shown(&loaded));
    };
    for program in &programs {
        load(program, "*nat\nCOMMIT\n*filter\nCOMMIT\n");
    }
    assert!(!gateway.dump(variant).contains(":W"));
    for (program, file) in programs.iter().zip(files) {
        load(program, &fs::read_to_string(file).unwrap());
    }
}

#[test]
fn saved_rules_survive_a_reboot() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        lab.servers.serve(
            "tcp",
            &[
                "10.9.0.1:5308",
                "10.9.0.2:5308",
                "[fd09::1]:5308",
                "[fd09::2]:5308",
            ],
        );
        let gateway = &lab.gateway;
        let [ipv4, ipv6] = ["ipv4", "ipv6"].map(|name| gateway.scratch().join(name));
        let request = json!({
            "name": "W", "variant": variant, "destination_port": 5308, "masquerade": true, "forward": true,
            "backends": "10.9.0.1,10.9.0.2,[fd09::1],[fd09::2]", "persist": {"ipv4": &ipv4, "ipv6": &ipv6},
        });
        let done = gateway.apply(&request);
        assert_eq!(
            written(&done),
            [ipv4.to_str().unwrap(), ipv6.to_str().unwrap()]
        );
        assert_eq!(gateway.apply(&request)["changed"], json!(false));
        reboot(gateway, variant, [&ipv4, &ipv6]);
        let again = gateway.apply(&request);
        assert_eq!(again["changed"], json!(false), "{variant} {again}");
        assert_eq!(
            lab.client.connect("tcp", "10.8.0.1:5308", 2),
            ["10.9.0.1", "10.9.0.2"]
        );
        assert_eq!(
            lab.client.connect("tcp", "[fd08::1]:5308", 2),
            ["fd09::1", "fd09::2"]
        );
    }
}

#[test]
fn of_a_saved_file_only_our_lines_change() {
    let gateway = Namespace::new("g");
    let file = gateway.scratch().join("rules");
    let theirs = "# typed by hand, with  blanks\n*filter\n:INPUT DROP [5:300]\n[1:60] -A INPUT -i lo -j ACCEPT\nCOMMIT\n\n\
                  *nat\n:PREROUTING ACCEPT [0:0]\n:MINE - [0:0]\n[3:180] -A PREROUTING -p tcp --dport 80 -j MINE\nCOMMIT\n# the end\n";
    fs::write(&file, theirs).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o604)).unwrap();
    chown(&file, Some(65534), Some(65534)).unwrap();
    let request = |last: u8| {
        json!({"name": "W", "destination_port": 5308, "persist": &file, "forward": last == 3,
        "backends": (1..=last).map(|n| format!("10.9.0.{n}")).collect::<Vec<_>>()})
    };
    for last in [2, 3, 1] {
        let done = gateway.apply(&request(last));
        assert_eq!(written(&done), [file.to_str().unwrap()]);
        assert_eq!(gateway.apply(&request(last))["changed"], json!(false));
        let text = fs::read_to_string(&file).unwrap();
        let others: Vec<&str> = text.lines().filter(|line| !line.contains('W')).collect();
        assert_eq!(others, theirs.lines().collect::<Vec<_>>());
        assert_eq!(text.matches("[0:0] -A W -p tcp").count(), usize::from(last));
    }
    // Running rules that are right do not hide a file that is not.
    fs::write(&file, theirs).unwrap();
    let mended = gateway.apply(&request(1));
    assert_eq!(mended["changes"].as_array().unwrap().len(), 1);
    assert!(mended["msg"].as_str().unwrap().contains("was updated"));

    let absent = json!({"name": "W", "state": "absent", "persist": &file});
    assert_eq!(written(&gateway.apply(&absent)), [file.to_str().unwrap()]);
    assert_eq!(gateway.apply(&absent)["changed"], json!(false));
    assert_eq!(fs::read_to_string(&file).unwrap(), theirs);
    let meta = fs::metadata(&file).unwrap();
    assert_eq!(
        (meta.mode() & 0o7777, meta.uid(), meta.gid()),
        (0o604, 65534, 65534)
    );
}

#[test]
fn a_file_that_cannot_be_read_or_written_changes_nothing() {
    for variant in VARIANTS {
        let gateway = Namespace::new("g").with_etc_of_its_own();
        let mut request = json!({
            "name": "W", "variant": variant, "destination_port": 80, "backends": "10.9.0.1", "ip_forward": true,
        });
        gateway.apply(&request);
        gateway.forward(false);
        let before = gateway.dump(variant);
        request["backends"] = json!("10.9.0.2");
        request["persist"] = json!(gateway.scratch().join("none/rules"));
        for check in [true, false] {
            request["check"] = json!(check);
            let failed = gateway.ask(&request);
            let message = failed["msg"].as_str().unwrap();
            assert!(
                message.contains("neither is its directory; nothing was changed"),
                "{message}"
            );
            assert_eq!(gateway.dump(variant), before);
        }
        assert_eq!(file(&gateway, "sysctl.d/zz-iptables_balance.conf"), None);

        let odd = gateway.scratch().join("odd");
        fs::write(&odd, "*nat\n-N W\nCOMMIT\n").unwrap();
        request["persist"] = json!(odd);
        let failed = gateway.ask(&request);
        let message = failed["msg"].as_str().unwrap();
        assert!(
            message.contains("persist: cannot read the rules in"),
            "{message}"
        );
        assert!(
            message.contains("line 2 of the dump is not iptables-save's"),
            "{message}"
        );
        assert_eq!(gateway.dump(variant), before);
    }
}

#[test]
fn persist_true_finds_what_is_loaded_at_boot() {
    let host = Namespace::new("h").with_etc_of_its_own();
    let request = json!({
        "name": "W", "destination_port": 80, "backends": "10.9.0.1,[fd09::1]", "persist": true, "ip_forward": true,
    });
    let failed = host.ask(&request);
    let message = failed["msg"].as_str().unwrap();
    assert!(
        message.contains("install `iptables-persistent` (Debian"),
        "{message}"
    );
    assert!(message.ends_with("nothing was changed"), "{message}");
    assert!(!host.dump("nft").contains('W'));

    host.add_units();
    host.forward(false);
    let done = host.apply(&request);
    assert_eq!(
        written(&done),
        [
            "/etc/iptables/ip6tables.rules",
            "/etc/iptables/iptables.rules",
            "/etc/sysctl.d/zz-iptables_balance.conf"
        ]
    );
    assert_eq!(host.apply(&request)["changed"], json!(false));
    assert!(
        file(&host, "iptables/iptables.rules")
            .unwrap()
            .contains("--to-destination 10.9.0.1")
    );
    assert!(
        file(&host, "iptables/ip6tables.rules")
            .unwrap()
            .contains("--to-destination fd09::1")
    );
    let settings = file(&host, "sysctl.d/zz-iptables_balance.conf").unwrap();
    assert!(
        settings.ends_with("\nnet.ipv4.ip_forward = 1\nnet.ipv6.conf.all.forwarding = 1\n"),
        "{settings}"
    );

    let mut other = request.clone();
    other["variant"] = json!("legacy");
    let message = host.ask(&other)["msg"].as_str().unwrap().to_owned();
    assert!(
        message.contains("which is nft here, but `variant` is legacy"),
        "{message}"
    );

    // A file that is loaded at boot is not forgotten.
    let mut without = request.clone();
    without["persist"] = json!(false);
    for result in [
        host.apply(&without),
        host.apply(&json!({"name": "W", "state": "absent", "check": true})),
    ] {
        let warnings = result["warnings"].to_string();
        assert!(
            warnings.contains("`/etc/iptables/iptables.rules` has something of the balancer too"),
            "{warnings}"
        );
    }
    let mode = |path: &str| {
        fs::metadata(host.etc.as_ref().unwrap().join(path))
            .unwrap()
            .mode()
            & 0o777
    };
    assert_eq!(mode("sysctl.d/zz-iptables_balance.conf"), 0o644);
    assert_eq!(mode("iptables/iptables.rules"), 0o640);

    let absent = json!({"name": "W", "state": "absent", "persist": true});
    assert_eq!(written(&host.apply(&absent)).len(), 2);
    assert_eq!(
        file(&host, "iptables/iptables.rules").unwrap(),
        "*nat\nCOMMIT\n"
    );
    assert_eq!(
        file(&host, "sysctl.d/zz-iptables_balance.conf").unwrap(),
        settings
    );
}

#[test]
fn names_are_resolved_at_each_run() {
    let host = Namespace::new("h").with_etc_of_its_own();
    let etc = host.etc.clone().unwrap();
    let hosts = |text: &str| fs::write(etc.join("hosts"), text).unwrap();
    fs::write(etc.join("nsswitch.conf"), "hosts: files\n").unwrap();
    let request = json!({
        "name": "W", "destination_port": 80, "backends": [{"address": "hubs.test", "weight": 4}, "hub.test:81"],
    });
    let shares = |result: &Value| -> Vec<String> {
        let shares = result["distribution"].as_array().unwrap().iter();
        let shown = |one: &Value| {
            format!(
                "{} {} {}",
                one["address"].as_str().unwrap(),
                one["weight"],
                one["share"]
            )
        };
        shares.map(shown).collect()
    };
    hosts("10.9.0.2 hubs.test\n10.9.0.1 hubs.test\n10.9.0.3 hub.test\nfd09::1 hubs.test\n");
    let done = host.apply(&request);
    assert_eq!(
        shares(&done),
        [
            "10.9.0.1 2 0.4",
            "10.9.0.2 2 0.4",
            "10.9.0.3 1 0.2",
            "fd09::1 4 1.0"
        ]
    );
    assert_eq!(host.apply(&request)["changed"], json!(false));

    hosts("10.9.0.4 hubs.test\n10.9.0.3 hub.test\n");
    let moved = host.apply(&request);
    assert_eq!(shares(&moved), ["10.9.0.4 4 0.8", "10.9.0.3 1 0.2"]);
    let before = host.dump("nft");

    hosts("10.9.0.3 hub.test\n");
    let failed = host.ask(&request);
    let message = failed["msg"].as_str().unwrap();
    assert!(
        message.starts_with("backends[0].address: `hubs.test` does not resolve: "),
        "{message}"
    );
    assert_eq!(
        (&failed["failed"], &failed["changed"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(host.dump("nft"), before);
}

/// An error in the request comes before an error of the host. It does not wait
/// for the dump, and leaves no process.
#[test]
fn errors_in_the_request_come_first() {
    let host = Namespace::new("h");
    let said = |script: &str, backend: &str| {
        let request =
            json!({"name": "W", "variant": "nft", "destination_port": 80, "backends": [backend]});
        let result = host.ask_with_stand_ins(&[("iptables-save", script)], &request);
        result["msg"].to_string()
    };
    let fails = "#!/bin/sh\nexit 3\n";
    // The table has to be there, or it would not be read.
    host.run(&["iptables-nft", "-t", "nat", "-P", "PREROUTING", "ACCEPT"]);
    let scratch = host.scratch().display().to_string();
    let hangs = format!(
        "#!/bin/bash\n[[ $1 = --version ]] && echo '(nf_tables)' && exit\nexec -a {scratch} sleep 600\n"
    );
    for script in [fails, &hangs] {
        let start = Instant::now();
        // The name is looked up meanwhile.
        let message = said(script, "nowhere.invalid");
        assert!(message.contains("backends[0]"), "{message}");
        let message = said(script, "10.9.0.1 weight=-1");
        assert!(
            message.contains("backends[0].weight: `-1` is not between"),
            "{message}"
        );
        assert!(start.elapsed() < Duration::from_secs(40), "{script}");
    }
    let left = Command::new("pgrep")
        .args(["-f", &scratch])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&left.stdout), "", "of {scratch}");
    let message = said(fails, "10.9.0.1");
    assert!(message.contains("failed (exit code 3)"), "{message}");
}

#[test]
fn a_service_stands_for_its_port_and_an_ambiguous_address_is_warned_of() {
    let host = Namespace::new("h").with_etc_of_its_own();
    let services = host.etc.as_ref().unwrap().join("services");
    fs::write(services, "mine 5309/tcp\nmine 5310/udp\n").unwrap();
    let mut request = json!({
        "name": "W", "destination_port": ["mine", 80], "backends": ["[fd09::1]:80", "fd09::2:80"],
    });
    let done = host.apply(&request);
    let warnings = done["warnings"].to_string();
    assert!(
        warnings.contains("`fd09::2:80` is an address without a port"),
        "{warnings}"
    );
    assert!(host.dump("nft").contains("--dports 80,5309 -j W"));
    request["protocol"] = json!("udp");
    host.apply(&request);
    assert!(host.dump("nft").contains("--dports 80,5310 -j W"));
}
