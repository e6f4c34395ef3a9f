"""Chat templates of ten families, written for these tests after what the families publish: what each writes, drops and refuses."""

QWEN_CALLS = """{%- for call in m.tool_calls %}{%- set f = call.function if call.function else call %}
{%- if (loop.first and m.content) or not loop.first %}{{ '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' + f.name + '", "arguments": ' }}
{{- f.arguments if TEXT and f.arguments is string else f.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor %}"""
TOOLS_BLOCK = "{{ '# Tools\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}"
QWEN25 = (
    "{%- set first = messages[0].content if messages[0].role == 'system' else 'You are Qwen.' %}"
    "{{- '<|im_start|>system\\n' + first }}{% if tools %}{{ '\\n\\n' }}"
    + TOOLS_BLOCK
    + "{% endif %}{{ '<|im_end|>\\n' }}"
    "{%- for m in messages %}{% if m.role == 'tool' %}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- elif not (m.role == 'system' and loop.first) %}{{- '<|im_start|>' + m.role + '\\n' }}{{ m.content or '' }}"
    "{%- if m.tool_calls %}" + QWEN_CALLS.replace("TEXT and ", "false and ") + "{% endif %}{{ '<|im_end|>\\n' }}"
    "{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN3 = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}" + TOOLS_BLOCK + "{{ '<|im_end|>\\n' }}{% endif %}"
    "{%- set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}{% endfor %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{%- if m.role == 'tool' %}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- elif m.role == 'assistant' %}{% set thought = '' %}"
    "{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}"
    "{%- endif %}{{ content }}{% if m.tool_calls %}" + QWEN_CALLS.replace("TEXT and ", "") + "{% endif %}"
    "{{- '<|im_end|>\\n' }}{% else %}{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
HEAD = "'<|start_header_id|>' + {} + '<|end_header_id|>\\n\\n'"
LLAMA31 = (
    "{{ bos_token }}{% set sys = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{%- set today = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "{{- " + HEAD.format("'system'") + " + 'Today Date: ' + today + '\\n\\n' + sys }}"
    "{%- if tools is not none %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{% endif %}{{ '<|eot_id|>' }}"
    "{%- for m in rest %}{% if 'tool_calls' in m %}"
    "{%- if m.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{{- " + HEAD.format("'assistant'") + ' + \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{- m.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}"
    "{%- elif m.role == 'tool' %}{{- " + HEAD.format("'ipython'") + " + (m.content | tojson) + '<|eot_id|>' }}"
    "{%- else %}{{- " + HEAD.format("m.role") + " + m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ " + HEAD.format("'assistant'") + " }}{% endif %}"
)
MISTRAL3 = (
    "{%- set sys = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}"
    "{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
    "{%- for m in rest %}{% if m.role == 'user' %}"
    "{%- if tools is not none and m == asked[-1] %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{- '[INST] ' + (sys if m == asked[-1] else '') + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls is defined and m.tool_calls is not none %}"
    "{{- '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{{ '' if loop.last else ', ' }}{% endfor %}"
    "{{- ']' + eos_token }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{%- elif m.role == 'tool' %}{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{- '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_SMALL = (
    "{{ bos_token }}{%- set sys = messages[0].content if messages[0].role == 'system' else "
    "'Today is ' + strftime_now('%Y-%m-%d') + '.' %}{{ '[SYSTEM_PROMPT]' + sys + '[/SYSTEM_PROMPT]' }}"
    "{%- for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}{% elif not loop.first %}"
    "{{- raise_exception('Only user, system and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA3 = (
    "{{ bos_token }}{%- set sys = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}"
    "{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{%- for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (sys if loop.first else '') }}"
    "{%- if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}"
    "{%- endif %}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GPT_OSS = (
    "{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '\\nReasoning: ' }}"
    "{{- (reasoning_effort if reasoning_effort is defined else 'medium') + '<|end|>' }}"
    "{%- if messages[0].role == 'system' or tools %}{{ '<|start|>developer<|message|>' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{%- if tools %}{% for tool in tools %}{{ '\\n// ' + tool.function.description + '\\ntype ' + tool.function.name + ' = (_: ' }}"
    "{{- tool.function.parameters | tojson + ') => any;' }}{% endfor %}{% endif %}{{ '<|end|>' }}{% endif %}"
    "{%- for m in messages %}{% if m.role == 'assistant' %}"
    "{%- if m.tool_calls %}{% if m.thinking %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% elif m.content %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' }}"
    "{{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{%- elif loop.last %}{% if m.thinking %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{%- elif m.role == 'tool' %}{{ '<|start|>functions to=assistant<|message|>' + m.content | tojson + '<|end|>' }}"
    "{%- elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{%- elif m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}"
    "{{- '<|Assistant|><|call|>' + c.function.name + '\\n' + c.function.arguments + '<|/call|>' }}{% endfor %}"
    "{{- '<|end_of_sentence|>' }}{% elif m.role == 'assistant' %}"
    "{{- '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end_of_sentence|>' }}"
    "{%- elif m.role == 'tool' %}{{ '<|output|>' + m.content + '<|/output|>' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
PHI4 = (
    "{%- for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
SMOLLM2 = (
    "{%- for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FAMILIES = {
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "llama3.1": LLAMA31,
    "mistral-v3": MISTRAL3,
    "mistral-small": MISTRAL_SMALL,
    "gemma3": GEMMA3,
    "gpt-oss": GPT_OSS,
    "deepseek-r1": DEEPSEEK_R1,
    "phi4": PHI4,
    "smollm2": SMOLLM2,
}
