//! The plans that come with the program.

use std::path::Path;

use super::ExperimentError;
use super::plan::Plan;
use crate::stress::scenario::Scenario;

/// Name and text of each, in the order in which they are listed.
pub const CATALOGUE: [(&str, &str); 12] = [
    ("identical-vms", include_str!("../../../../resources/experiments/identical-vms.toml")),
    ("ideal", include_str!("../../../../resources/experiments/ideal.toml")),
    ("side-channel", include_str!("../../../../resources/experiments/side-channel.toml")),
    ("fidelity", include_str!("../../../../resources/experiments/fidelity.toml")),
    ("page-cache", include_str!("../../../../resources/experiments/page-cache.toml")),
    ("scanner-pareto", include_str!("../../../../resources/experiments/scanner-pareto.toml")),
    ("clone-fanout", include_str!("../../../../resources/experiments/clone-fanout.toml")),
    ("inflate-deflate", include_str!("../../../../resources/experiments/inflate-deflate.toml")),
    ("shootdown", include_str!("../../../../resources/experiments/shootdown.toml")),
    ("huge-pages", include_str!("../../../../resources/experiments/huge-pages.toml")),
    ("mixed", include_str!("../../../../resources/experiments/mixed.toml")),
    ("thrashing", include_str!("../../../../resources/experiments/thrashing.toml")),
];

/// Experiments that are scenarios of `samepage stress`: one run each, with a verdict. Name and text
/// of each.
const SCENARIOS: [(&str, &str); 9] = [
    ("ksm-52", include_str!("../../../../resources/scenarios/ksm-52.toml")),
    ("cow-storm", include_str!("../../../../resources/scenarios/cow-storm.toml")),
    ("cow-storm-ratio", include_str!("../../../../resources/scenarios/cow-storm-ratio.toml")),
    ("cow-storm-strict", include_str!("../../../../resources/scenarios/cow-storm-strict.toml")),
    ("idle-tax", include_str!("../../../../resources/scenarios/idle-tax.toml")),
    ("admission", include_str!("../../../../resources/scenarios/admission.toml")),
    ("thrashing-knee", include_str!("../../../../resources/scenarios/thrashing-knee.toml")),
    ("hostile-guests", include_str!("../../../../resources/scenarios/hostile-guests.toml")),
    ("swap-full", include_str!("../../../../resources/scenarios/swap-full.toml")),
];

/// Names this similar are taken for a typing error, by Jaro and Winkler.
const SIMILAR: f64 = 0.75;

/// All plans that come with the program.
///
/// # Errors
/// One of them is invalid: a fault in Samepage, which a test rules out.
pub fn all() -> Result<Vec<Plan>, ExperimentError> {
    CATALOGUE.iter().map(|(_, text)| Plan::parse(text, Path::new("."))).collect()
}

/// All scenarios that are experiments.
///
/// # Errors
/// As [`all`].
pub fn scenarios() -> Result<Vec<Scenario>, ExperimentError> {
    SCENARIOS.iter().map(|(_, text)| Ok(Scenario::parse(text, Path::new("."))?)).collect()
}

/// The scenario of this name; None if there is none.
///
/// # Errors
///
/// As [`all`].
pub fn scenario(name: &str) -> Result<Option<Scenario>, ExperimentError> {
    Ok(scenarios()?.into_iter().find(|scenario| scenario.name == name))
}

/// Every name there is.
fn names() -> impl Iterator<Item = &'static str> + Clone {
    CATALOGUE.iter().chain(&SCENARIOS).map(|(name, _)| *name)
}

/// The plan of this name, or in the file of this name.
///
/// # Errors
/// There is neither; the file cannot be read or is no plan.
pub fn find(name: &str) -> Result<Plan, ExperimentError> {
    if let Some((_, text)) = CATALOGUE.iter().find(|(known, _)| *known == name) {
        return Plan::parse(text, Path::new("."));
    }
    let path = Path::new(name);
    if path.exists() || name.contains('/') || name.ends_with(".toml") {
        return Plan::read(path);
    }
    let similar = names().map(|known| (strsim::jaro_winkler(name, known), known));
    let best = similar.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(likeness, _)| *likeness >= SIMILAR);
    Err(ExperimentError::Unknown {
        name: name.into(),
        meant: best.map_or(String::new(), |(_, known)| format!("; did you mean {known:?}?")),
        known: names().collect::<Vec<_>>().join(", "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_plan_that_comes_along_is_right_and_named_as_its_file() {
        let plans = all().unwrap();
        for (plan, (name, _)) in plans.iter().zip(CATALOGUE) {
            assert_eq!(plan.name, name);
            assert!(!plan.about.is_empty() && !plan.source.is_empty() && plan.points().len() > 1, "{name}");
        }
    }

    #[test]
    fn every_scenario_that_comes_along_is_right_and_named_as_its_file() {
        for (scenario, (name, _)) in scenarios().unwrap().iter().zip(SCENARIOS) {
            assert!(scenario.name == name && !scenario.about.is_empty(), "{name}");
            assert!(CATALOGUE.iter().all(|(plan, _)| *plan != name), "{name} is a plan, too");
        }
        assert!(scenario("ksm-52").unwrap().is_some() && scenario("identical-vms").unwrap().is_none());
        assert!(find("ksm-5").unwrap_err().to_string().contains("did you mean \"ksm-52\"?"));
    }

    #[test]
    fn a_slip_of_the_finger_is_answered_with_what_was_meant() {
        let error = find("identical-vm").unwrap_err().to_string();
        assert!(error.contains("did you mean \"identical-vms\"?"), "{error}");
        let error = find("xyzzy").unwrap_err().to_string();
        assert!(!error.contains("did you mean") && error.contains("side-channel"), "{error}");
    }
}
