//! A pair of gateways with keepalived: `examples/ha/demo.sh`.

use std::process::{Command, Output};

use crate::lab::{PROGRAM, VARIANTS, shown};

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/ha/demo.sh");

fn demo(variant: &str, mode: &str) -> Output {
    let mut demo = Command::new(DEMO);
    demo.env("IPTABLES_BALANCE", PROGRAM);
    demo.envs([("VARIANT", variant), ("MODE", mode)]);
    demo.output().expect("the demo starts")
}

#[test]
fn two_hundred_clients_speak_on_when_their_gateway_dies() {
    std::thread::scope(|scope| {
        for variant in VARIANTS {
            scope.spawn(move || {
                let output = demo(variant, "hash");
                assert!(output.status.success(), "{variant}: {}", shown(&output));
            });
        }
        // The demo can fail: nothing but the hash saves them.
        scope.spawn(|| {
            let output = demo("nft", "nth");
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(
                !output.status.success() && text.contains("spoke on with it"),
                "{}",
                shown(&output)
            );
        });
    });
}
