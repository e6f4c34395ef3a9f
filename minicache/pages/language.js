"use strict";
// Shows a page in Chinese where the browser prefers it to English; the button switches, and the browser remembers.
const LANGUAGE = "minidpo-language";
function preferred(languages) {
  const first = languages.find((one) => /^(zh|en)\b/i.test(one));
  return first && first.toLowerCase().startsWith("zh") ? "zh" : "en";
}
function startLanguage(show) {  // show("zh" or "en") is called now, and again at each switch
  const button = document.getElementById("language");
  let language = preferred(navigator.languages || [navigator.language || ""]);
  try { language = { zh: "zh", en: "en" }[localStorage.getItem(LANGUAGE)] || language; } catch { /* nothing is kept here */ }
  const draw = () => {
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
    button.textContent = language === "zh" ? "English" : "中文";
    button.lang = language === "zh" ? "en" : "zh-CN";
    show(language);
  };
  button.hidden = false;
  button.onclick = () => {
    language = language === "zh" ? "en" : "zh";
    try { localStorage.setItem(LANGUAGE, language); } catch { /* nothing is kept here */ }
    draw();
  };
  draw();
}
