//! Hook points under their names.

pub(super) mod one {
    use model_hooks::HookPoint;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(point: &HookPoint, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(point)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<HookPoint, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

pub(super) mod list {
    use model_hooks::HookPoint;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(
        points: &[HookPoint],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(points.iter().map(ToString::to_string))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<HookPoint>, D::Error> {
        let names = Vec::<String>::deserialize(deserializer)?;
        names.iter().map(|name| name.parse()).collect::<Result<_, _>>().map_err(D::Error::custom)
    }
}
