"""`minidpo export`."""

from minicache.commands.assemble import Given, command_of, extra_parameter, parameter_of, parameters_of
from minicache.commands.extras import DEVICE, JSON
from minicache.commands.running import err, errors_as_one_line, out, print_json, run_stage
from minicache.errors import ConfigError
from minicache.options.declare import flag, options_of
from minicache.options.exchange import ExportCacheConfig, ExportConfig
from minicache.screen.live import Screen
from minicache.screen.results import show_export, show_export_cache

REF_CACHE = {item.name: declared for item, declared in options_of(ExportCacheConfig)}["ref_cache"]
OF_A_POLICY = ("dtype", "tokenizer", "trust_remote_code")
OUT, POLICY, *REST = parameters_of(ExportConfig, {}, optional=("policy",))
PARAMETERS = [
    OUT,
    POLICY,
    parameter_of("ref_cache", str | None, None, REF_CACHE),
    *REST,
    extra_parameter(DEVICE),
    extra_parameter(JSON),
]


@command_of(PARAMETERS)
def export(given: Given) -> None:
    """Write a policy as a Hugging Face directory, adapters merged, or as a MiniMind .pth; or a reference cache as a table."""
    with errors_as_one_line():
        options = given.options
        if ("policy" in options) == ("ref_cache" in options):
            got = "both" if "policy" in options else "neither"
            raise ConfigError(f"export: expected --policy POLICY or --ref-cache CACHE, got {got}")
        if "policy" in options:
            show = print_json if given.json else show_export
            run_stage("export", given.config(ExportConfig), 1, show, given.device)
            return
        if given.device != DEVICE.default:
            raise ConfigError("--device: a cache is exported without computing; leave it out")
        if wrong := [flag(name) for name in OF_A_POLICY if name in options]:
            raise ConfigError(f"{', '.join(wrong)}: for --policy only; a cache has its own; leave it out")
        _export_cache(given.config(ExportCacheConfig), given.json)


def _export_cache(config: ExportCacheConfig, as_json: bool) -> None:
    from minicache.stages.export_cache import export_cache

    with Screen(err) as tracker:
        report = export_cache(config, tracker)
    print_json(out, report) if as_json else show_export_cache(out, report)
