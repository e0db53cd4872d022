//! A training run that is killed twenty times ends with the same bits as one that is not.

use std::process::Command;

#[test]
fn twenty_kills_change_nothing() {
    let output = Command::new(env!("CARGO_BIN_EXE_benches"))
        .args(["soak", "--kills", "20"])
        .output()
        .expect("the program starts");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_str(&told).expect("a line of JSON");
    assert_eq!((&report["kills"], &report["terminations"]), (&20.into(), &1.into()));
    assert!(report["kills_in_a_save"].as_u64().is_some_and(|n| n > 0), "{report}");
}
